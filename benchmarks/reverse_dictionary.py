"""Compress a pretrained sentence encoder without retraining, and ask it for the words that dictionary entries define.

The model is all-MiniLM-L6-v2, the data are WordNet's glosses.  Of ``--pairs`` entries drawn by ``--seed``, each gloss
ranks all lemmas by the cosine of their embeddings; recall@k is how often its own lemma is among the first k.  The
encoder's linears are restructured to a share of their parameters.  Calibration glosses share no gloss and no lemma with
the entries.  Each method surveys the model once for all shares.

    python -m benchmarks.reverse_dictionary --model FOLDER --wordnet FOLDER

``--model`` is a folder that transformers loads, ``--wordnet`` one that holds data.noun, data.verb and data.adj.
"""

from __future__ import annotations

import argparse
import copy
import random
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

import structfly
from benchmarks import recording
from benchmarks.recording import Row
from structfly import Budget, Distillation, Plan, Survey, measure
from structfly.restructure.measuring import Loss

KERNEL = "reverse_dictionary"
SHARES = (0.75, 0.6, 0.5, 0.4, 0.3)


class Method(NamedTuple):
    """A strategy, and what the survey that it plans with is given; without calibration the weights alone decide."""

    strategy: str
    options: dict[str, Any]
    calibrated: bool = True


METHODS = {
    "uniform plain SVD": Method("uniform", {"structures": ["low_rank"]}, calibrated=False),
    "uniform whitened SVD": Method("uniform", {"structures": ["low_rank"], "sensitivity": "inputs"}),
    "Pixelfly's allocation": Method("pixelfly", {"structures": ["pixelfly"]}),
    "solver": Method("solver", {}),
}
Pairs = list[tuple[str, str]]


def entries(folder: Path) -> Pairs:
    """All (lemma, gloss) with a lower-case lemma and a gloss of more than 15 characters."""
    found = []
    for part in ("noun", "verb", "adj"):
        for line in (folder / f"data.{part}").read_text(encoding="latin1").splitlines():
            if line.startswith("  "):
                continue
            head, gloss = line.split("|", 1)
            lemma = re.sub(r"\(.*\)", "", head.split()[4].replace("_", " "))
            gloss = re.split(r'; "', gloss)[0].strip().strip(";")
            if lemma[0].islower() and len(gloss) > 15:
                found.append((lemma, gloss))
    return found


def sample(everything: Pairs, count: int, seed: int) -> Pairs:
    """Entries of different lemmas."""
    order = list(range(len(everything)))
    random.Random(seed).shuffle(order)
    chosen: dict[str, str] = {}
    for index in order:
        chosen.setdefault(*everything[index])
        if len(chosen) == count:
            break
    return list(chosen.items())


def calibration_glosses(everything: Pairs, held_out: Pairs, count: int, seed: int = 1) -> list[str]:
    """Glosses of entries that share neither lemma nor gloss with ``held_out``."""
    lemmas, glosses = {lemma for lemma, _ in held_out}, {gloss for _, gloss in held_out}
    rest = [gloss for lemma, gloss in everything if lemma not in lemmas and gloss not in glosses]
    return random.Random(seed).sample(rest, count)


def tokenised(tokenizer: Any, texts: Sequence[str], batch: int = 64) -> list[Any]:
    return [
        tokenizer(list(texts[i : i + batch]), padding=True, truncation=True, max_length=128, return_tensors="pt")
        for i in range(0, len(texts), batch)
    ]


def embedding(model: nn.Module, tokens: Any) -> Tensor:
    """The mean of the last hidden states over a text's tokens (texts, features)."""
    hidden = model(**tokens).last_hidden_state
    counts = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    mean: Tensor = (hidden * counts).sum(1) / counts.sum(1)
    return mean


DISTANCE = Distillation(embedding, "embeddings")


@torch.no_grad()
def recall(model: nn.Module, glosses: list[Any], lemmas: list[Any]) -> dict[str, float]:
    """recall@1, recall@10 and the mean reciprocal rank of each gloss's own lemma."""
    asked, known = (
        nn.functional.normalize(torch.cat([embedding(model, each) for each in texts]), dim=-1)
        for texts in (glosses, lemmas)
    )
    cosines = asked @ known.T
    rank = (cosines > cosines.diag()[:, None]).sum(1)
    return {
        "recall_at_1": (rank < 1).double().mean().item(),
        "recall_at_10": (rank < 10).double().mean().item(),
        "mean_reciprocal_rank": (1 / (rank + 1.0)).double().mean().item(),
    }


def surveyed(dense: nn.Module, method: Method, batches: list[Any], resume: Path | None) -> Survey:
    """What the method knows of the model's encoder."""
    given: dict[str, Any] = {"include": ["encoder.*"], "progress": False, **method.options}
    if method.calibrated:
        given |= {"calibration": batches, "loss_fn": DISTANCE, "resume": resume}
    return structfly.survey(dense, **given)


def compressed(dense: nn.Module, survey: Survey, plan: Plan) -> nn.Module:
    """A copy, restructured."""
    model = copy.deepcopy(dense)
    structfly.apply_(model, plan, statistics=survey.statistics)
    return model


def predictions(plan: Plan) -> dict[str, float]:
    """What a plan says of itself, what is proven of it included."""
    share = plan.total("params") / plan.total("params", dense=True)
    proven = {name: value for name, value in (("bound", plan.bound), ("gap", plan.gap)) if value is not None}
    return {"predicted_loss": plan.predicted_loss, **proven, "share_of_parameters": share}


def rows_of(mode: str, provider: str, values: dict[str, float]) -> list[Row]:
    return [Row.of_value(v, kernel=KERNEL, provider=provider, mode=mode, metric=name) for name, v in values.items()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    from transformers import AutoModel, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--wordnet", required=True, type=Path)
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="of the entries; 0 is for reports, others are for tuning")
    parser.add_argument("--glosses", type=int, default=512, help="for calibration")
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--statistics", type=Path, help="a file that keeps the statistics of calibration")
    parser.add_argument("--output", type=Path, help="write this path with .csv and .json added")
    given = sys.argv[1:] if arguments is None else arguments
    chosen = parser.parse_args(given)
    console = Console(width=150)
    tokenizer: Any = AutoTokenizer.from_pretrained(chosen.model)
    dense = AutoModel.from_pretrained(chosen.model).eval()
    everything = entries(chosen.wordnet)
    pairs = sample(everything, chosen.pairs, chosen.seed)
    glosses, lemmas = (tokenised(tokenizer, [pair[k] for pair in pairs]) for k in (1, 0))
    batches = tokenised(tokenizer, calibration_glosses(everything, pairs, chosen.glosses))
    mode = f"{chosen.pairs} pairs, seed {chosen.seed}"
    rows = rows_of(f"{mode}, dense", "dense", recall(dense, glosses, lemmas))
    console.print(f"dense: {rows[0].p50:.4f}", highlight=False)
    loss = Loss(dense, batches, DISTANCE, seed=0)
    for name in chosen.methods:
        start = time.perf_counter()
        survey = surveyed(dense, METHODS[name], batches, chosen.statistics)
        rows += rows_of(f"{mode}, survey", name, {"seconds": time.perf_counter() - start})
        console.print(f"{name}: surveyed in {rows[-1].p50:.4g} s", highlight=False)
        for share in chosen.shares:
            start = time.perf_counter()
            plan = survey.plan(Budget(params=share), METHODS[name].strategy)
            model = compressed(dense, survey, plan)
            values = {"seconds": time.perf_counter() - start, **predictions(plan), "measured_loss": loss.of(model)}
            values |= recall(model, glosses, lemmas)
            rows += rows_of(f"{mode}, {share:.0%} of the parameters", name, values)
            shown = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
            console.print(f"{share:.0%} {name}: {shown}", highlight=False)
            if chosen.output:  # a run that is stopped leaves what it has
                environment = measure.environment("cpu")
                recording.write(chosen.output, rows, environment=environment, command=_public_command(given))
    return 0


def _public_command(arguments: Sequence[str]) -> str:
    """The command with the folders' names left out."""
    private = {"--model": "MODEL", "--wordnet": "WORDNET", "--statistics": "STATISTICS"}
    shown = [private.get(before, word) for before, word in zip(["", *arguments], arguments, strict=False)]
    return recording.command_line("benchmarks.reverse_dictionary", shown)


if __name__ == "__main__":
    sys.exit(main())

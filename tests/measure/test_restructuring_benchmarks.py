"""The benchmarks of restructuring: their data, their metric, and what they write."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from benchmarks import reverse_dictionary, solver_time
from structfly import Budget, StructuredLinear


def wordnet(folder: Path) -> Path:
    lines = {
        "noun": ["  1 a licence", '1 03 n 01 dog 0 000 | a domesticated animal that barks; "the dog"'],
        "verb": ["1 03 v 01 run_away 0 000 | to flee, taking to one's heels", "1 03 v 01 go 0 000 | to move"],
        "adj": ["1 03 a 01 big(a) 0 000 | above average in size", "1 03 a 01 Greek 0 000 | of or relating to Greece"],
    }
    for part, each in lines.items():
        (folder / f"data.{part}").write_text("\n".join(each), encoding="latin1")
    return folder


def test_entries_are_lower_case_lemmas_with_long_glosses(tmp_path: Path) -> None:
    assert reverse_dictionary.entries(wordnet(tmp_path)) == [
        ("dog", "a domesticated animal that barks"),
        ("run away", "to flee, taking to one's heels"),
        ("big", "above average in size"),
    ]


def test_calibration_shares_nothing_with_the_sample() -> None:
    everything = [(f"word{i % 40}", f"gloss {i % 50}") for i in range(100)]
    pairs = reverse_dictionary.sample(everything, 10, seed=0)
    assert len({lemma for lemma, _ in pairs}) == 10
    held = {gloss for _, gloss in pairs}
    glosses = reverse_dictionary.calibration_glosses(everything, pairs, 5)
    assert not held & set(glosses)


class Words(nn.Module):
    """Embeds text i as the i-th row of a table."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(last_hidden_state=self.table[input_ids])


def test_recall_counts_ranks() -> None:
    table = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [0.8, 0.6]])
    model = Words(table)

    def texts(*ids: int) -> list[dict[str, Tensor]]:
        return [{"input_ids": torch.tensor([[each]]), "attention_mask": torch.ones(1, 1)} for each in ids]

    # The gloss 2 is nearest to its lemma 0; the gloss 3 is nearer to the lemma 0 than to its own, 1.
    found = reverse_dictionary.recall(model, texts(2, 3), texts(0, 1))
    assert found == {"recall_at_1": 0.5, "recall_at_10": 1.0, "mean_reciprocal_rank": 0.75}


@pytest.mark.parametrize("name", reverse_dictionary.METHODS)
def test_every_method_makes_a_smaller_encoder(name: str) -> None:
    """Of a tiny one, whose other layers stay."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=128, num_hidden_layers=1, num_attention_heads=2, intermediate_size=256
    )
    dense = BertModel(config)
    ids = torch.randint(40, (8, 6))
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    method = reverse_dictionary.METHODS[name]
    survey = reverse_dictionary.surveyed(dense, method, batches, None)
    plan = survey.plan(Budget(params=0.7), method.strategy)
    model = reverse_dictionary.compressed(dense, survey, plan)
    found = reverse_dictionary.predictions(plan)
    assert set(found) == {"predicted_loss", "share_of_parameters"} | ({"bound", "gap"} if name == "solver" else set())
    assert 0.3 < found["share_of_parameters"] <= 0.7
    layers = {name: layer for name, layer in plan.layers.items() if layer.structure is not None}
    assert layers
    assert all(name.startswith("encoder.") for name in plan.layers)
    for each in layers:
        assert isinstance(model.get_submodule(each), StructuredLinear)
        assert isinstance(dense.get_submodule(each), nn.Linear)


def test_folders_are_no_part_of_the_recorded_command() -> None:
    command = reverse_dictionary._public_command(["--model", "/x", "--wordnet", "/y", "--seed", "0", "--output", "/z"])
    assert command == "python -m benchmarks.reverse_dictionary --model MODEL --wordnet WORDNET --seed 0"


def test_solver_time_writes_times_and_gaps(tmp_path: Path) -> None:
    output = tmp_path / "solver"
    given = ["--layers", "6", "--candidates", "5", "--problems", "2", "--output", str(output)]
    assert solver_time.main(given) == 0
    rows = json.loads(output.with_name("solver.json").read_text())["rows"]
    assert {row["metric"]: len(row["samples"]) for row in rows} == {"time_s": 2, "gap": 2}
    assert all(sample == 0.0 for row in rows if row["metric"] == "gap" for sample in row["samples"])

"""Train the same GPT three times: eager, Inductor, structfly.  Same curve, less memory?

``make demo`` runs this.  Each run is a process of its own, and their steps take turns.  Two further eager runs set the
tolerances: the first step in float64, and a run whose initial parameters were moved by one rounding.  The exit status
is 1 if a check fails.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from examples import checks, corpus
from examples.gpt import GPTConfig
from examples.sources import python_sources
from examples.training import RunResult, RunSpec, compute_dtype, unit_roundoff
from examples.workers import run_together

COMPILED = ("inductor", "structfly")
WARMUP_STEPS = 3
SIZES = {
    "cpu": {
        "batch": 4,
        "context": 256,
        "width": 256,
        "layers": 3,
        "heads": 4,
        "vocabulary": 32_768,
        "steps": 20,
    },
    "cuda": {
        "batch": 8,
        "context": 1024,
        "width": 1024,
        "layers": 8,
        "heads": 16,
        "vocabulary": 32_768,
        "steps": 60,
    },
}


def sparkline(losses: Sequence[float]) -> str:
    """A curve in one line of text; the highest bar is the largest loss, the lowest the smallest."""
    low, high = min(losses), max(losses)
    bars = "▁▂▃▄▅▆▇█"
    return "".join(bars[round((loss - low) / ((high - low) or 1) * (len(bars) - 1))] for loss in losses)


def curves_table(results: Mapping[str, RunResult], allowed: Sequence[float]) -> Table:
    """Steps by backends, with the band around eager."""
    table = Table(title="Loss", title_justify="left")
    table.add_column("step", justify="right")
    for name in results:
        table.add_column(name, justify="right")
    table.add_column("band ±", justify="right")
    for step, limit in enumerate(allowed):
        losses = (f"{result.losses[step]:.6f}" for result in results.values())
        table.add_row(str(step), *losses, f"{limit:.1e}")
    table.add_row("", *(sparkline(result.losses) for result in results.values()), "")
    return table


def cost_table(results: Mapping[str, RunResult]) -> Table:
    """Time and memory of a training step (loss, backward, AdamW), and their ratios to eager's."""
    table = Table(title="Cost of a training step", title_justify="left")
    for heading in ("backend", "median time", "x eager", "extra memory at the peak", "x eager"):
        table.add_column(heading, justify="left" if heading == "backend" else "right")
    times = {name: statistics.median(result.seconds[WARMUP_STEPS:]) for name, result in results.items()}
    for name, result in results.items():
        table.add_row(
            name,
            f"{times[name] * 1e3:.1f} ms",
            f"{times[name] / times['eager']:.2f}",
            f"{result.peak_bytes / 2**20:.0f} MiB",
            f"{result.peak_bytes / results['eager'].peak_bytes:.2f}",
        )
    return table


def demo(spec: RunSpec, backends: Sequence[str], options: dict[str, Any], console: Console) -> bool:
    """Make all runs and print everything; True if every check passed."""
    specs = {"eager": spec}
    for backend in backends:
        specs[backend] = replace(spec, backend=backend, options=options if backend == "structfly" else {})
    tolerances = {
        "eager in float64": replace(spec, variant="float64", steps=0),
        "eager, perturbed": replace(spec, variant="perturbed"),
    }
    outcomes = run_together({**specs, **tolerances}, console.print)
    results = {name: outcomes[name].result for name in specs}
    first = {name: outcomes[name].first_step for name in specs}
    exact, perturbed = outcomes["eager in float64"].first_step, outcomes["eager, perturbed"].result

    unit = unit_roundoff(compute_dtype(spec.device))
    eager = results["eager"].losses
    own_error = checks.loss_error(first["eager"], exact)
    allowed = checks.band(eager, perturbed.losses, own_error=own_error, unit=unit)
    console.print(curves_table(results, allowed), cost_table(results))
    for result in results.values():
        if result.report:
            console.print(result.report, markup=False, highlight=False)
    passed = True
    for backend in backends:
        verdicts = checks.check_first_step(first[backend], first["eager"], exact, unit=unit)
        for verdict in (*verdicts, checks.check_curve(results[backend].losses, eager, allowed)):
            passed &= verdict.passed
            word = "[green]PASS[/]" if verdict.passed else "[bold red]FAIL[/]"
            console.print(f"{word} {backend}: {verdict.name}: {verdict.detail}", soft_wrap=True)
    environment = results["eager"].environment
    console.print(" | ".join(f"{key} {value}" for key, value in environment.items()), soft_wrap=True)
    return passed


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; sizes default to the device's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SIZES, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backends", nargs="+", choices=COMPILED, default=COMPILED, help="runs beside eager's")
    parser.add_argument("--options", type=json.loads, default={}, help="structfly's options, as JSON")
    parser.add_argument("--untied", action="store_true", help="give the head a weight of its own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    for name in SIZES["cpu"]:
        parser.add_argument(f"--{name}", type=int, help=", ".join(f"{d}: {SIZES[d][name]}" for d in SIZES))
    namespace = parser.parse_args(arguments)
    for name, default in SIZES[namespace.device].items():
        if getattr(namespace, name) is None:
            setattr(namespace, name, default)
    if namespace.steps <= WARMUP_STEPS:
        parser.error(f"--steps is {namespace.steps}; more than {WARMUP_STEPS} are needed, the first ones are warm-up")
    return namespace


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    chosen = parse_arguments(arguments)
    console = Console(width=None if sys.stdout.isatty() else 120)
    documents = python_sources()
    text = corpus.load(documents, vocabulary=chosen.vocabulary)
    console.print(
        f"corpus: {len(documents)} files of the Python standard library, {len(text.tokens):,} tokens, "
        f"BPE vocabulary {text.tokenizer.get_vocab_size():,}, sha256 {text.digest}"
    )
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens.npy"
        np.save(tokens, text.tokens, allow_pickle=False)
        spec = RunSpec(
            backend="eager",
            variant="plain",
            device=chosen.device,
            tokens=str(tokens),
            end_of_text=corpus.END_OF_TEXT_ID,
            batch=chosen.batch,
            steps=chosen.steps,
            seed=chosen.seed,
            learning_rate=chosen.learning_rate,
            model=GPTConfig(
                vocabulary=chosen.vocabulary,
                context=chosen.context,
                width=chosen.width,
                layers=chosen.layers,
                heads=chosen.heads,
                tied=not chosen.untied,
            ),
        )
        return 0 if demo(spec, chosen.backends, chosen.options, console) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Time of the budget solver: layers with many candidates each, under three budgets at once, to a gap of 0.

python -m benchmarks.solver_time
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks import recording
from benchmarks.recording import Row
from structfly import measure
from structfly.rewriter.solver import Option, solve

KERNEL = "budget_solver"
RESOURCES = ("params", "flops", "time")


def problem(layers: int, candidates: int, seed: int) -> tuple[list[list[Option]], dict[str, float]]:
    """Layers of two sizes whose losses fall with what they use, unevenly, and half of everything as the budget."""
    draw = random.Random(seed)
    sites = []
    for _ in range(layers):
        size, weight = draw.choice((16.0, 44.0)), draw.lognormvariate(0, 1)
        options = [Option(0.0, dict.fromkeys(RESOURCES, size))]
        for number in range(1, candidates):
            share = number / candidates
            amounts = (share, share * draw.lognormvariate(0, 0.2), 0.3 + share * draw.lognormvariate(0, 0.3))
            uses = {name: size * amount for name, amount in zip(RESOURCES, amounts, strict=True)}
            options.append(Option(weight * (1 - share) ** 2 * draw.lognormvariate(0, 0.3), uses))
        sites.append(options)
    whole = sum(options[0].uses["params"] for options in sites)
    return sites, {"params": 0.5 * whole, "flops": 0.5 * whole, "time": 0.7 * whole}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=224)
    parser.add_argument("--candidates", type=int, default=50)
    parser.add_argument("--problems", type=int, default=5, help="drawn one after another")
    parser.add_argument("--output", type=Path, help="write this path with .csv and .json added")
    given = sys.argv[1:] if arguments is None else arguments
    chosen = parser.parse_args(given)
    console = Console(width=150)
    seconds, gaps = [], []
    for seed in range(chosen.problems):
        sites, limits = problem(chosen.layers, chosen.candidates, seed)
        start = time.perf_counter()
        solution = solve(sites, limits=limits)
        seconds.append(time.perf_counter() - start)
        gaps.append(solution.gap)
        console.print(f"problem {seed}: {seconds[-1]:.2f} s, gap {gaps[-1]:.2g}", highlight=False)
    mode = f"{chosen.layers} layers x {chosen.candidates} candidates, 3 budgets"
    rows = []
    for metric, samples in (("time_s", seconds), ("gap", gaps)):
        found = measure.summarize(samples)
        rows.append(Row.of_timing(found, kernel=KERNEL, provider="structfly", mode=mode, metric=metric))
    if chosen.output:
        command = recording.command_line("benchmarks.solver_time", given)
        recording.write(chosen.output, rows, environment=measure.environment("cpu"), command=command)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the work that stands before a call does to its time: the layers of structured_linear behind other works.

In one process and in rotation each call is timed behind square products of so many milliseconds, and behind its own
calls for so long, as in a model of such layers alone, with products ahead of those while the host launches them.
"x dense" is of dense calls behind the same work.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import recording, structured_layers
from benchmarks.busy import MARGIN, times_behind_work, work_for
from benchmarks.recording import Row
from benchmarks.structured_case import PASSES, Case, add_layer_arguments, warm_calls, x_dense
from benchmarks.structured_layers import BARS, DENSE
from structfly import measure
from structfly.records.layer import LayerSizes

KERNEL = "work_before"

Turn = tuple[str, "Work"]
"""A call's name, and what stands before it."""


class Work(NamedTuple):
    """What stands before a call: seconds, of products or, ``own``, of the layer's own calls."""

    seconds: float
    own: bool

    def __str__(self) -> str:
        return f"{1e3 * self.seconds:g} ms of {'its own calls' if self.own else 'products'}"


def befores(calls: Mapping[str, Callable[[], object]], works: Sequence[Work]) -> dict[Turn, Callable[[], object]]:
    """For each call and work, what launches the work."""
    products = {work: work_for(work.seconds) for work in works if not work.own}
    device, host = times_behind_work(calls, "cuda", repeats=5)
    made: dict[Turn, Callable[[], object]] = {}
    for name, call in calls.items():
        for work in works:
            if not work.own:
                made[name, work] = products[work]
                continue
            count = round(work.seconds / device[name].median)
            made[name, work] = partial(_after, work_for(MARGIN * count * host[name].p80), call, count)
    return made


def _after(lead: Callable[[], object], call: Callable[[], object], count: int) -> None:
    lead()
    for _ in range(count):
        call()


def measure_case(
    case: Case, calls: Mapping[str, Callable[[], object]], works: Sequence[Work], repeats: int
) -> list[Row]:
    """Times and "x dense" of every call behind every work; a round is each once, in an order of its own."""
    before = befores(calls, works)
    turns = {_mode(case, work) + name: (name, work) for name, work in before}
    times = measure.times_in_rotation(
        {turn: calls[name] for turn, (name, _) in turns.items()},
        "cuda",
        repeats=repeats,
        before={turn: before[each] for turn, each in turns.items()},
    )
    rows = []
    for turn, (name, work) in turns.items():
        mode = _mode(case, work)
        of = {"time_s": times[turn], "x_dense": x_dense(times[mode + DENSE], times[turn])}
        rows += [
            Row.of_timing(timing, kernel=KERNEL, provider=name, mode=mode, metric=metric)
            for metric, timing in of.items()
        ]
    return rows


def _mode(case: Case, work: Work) -> str:
    return f"{case.mode}, behind {work}"


def case_table(case: Case, rows: Sequence[Row], works: Sequence[Work]) -> Table:
    """A line for each layer, with a column for each work."""
    values = {(row.provider, row.mode, row.metric): row.p50 for row in rows}
    table = Table(title=f"{case.mode}: ms and x dense, behind", title_justify="left")
    table.add_column("provider")
    for work in works:
        table.add_column(str(work), justify="right")
    for provider in dict.fromkeys(row.provider for row in rows):
        cells = []
        for work in works:
            time, ratio = (values[provider, _mode(case, work), each] for each in ("time_s", "x_dense"))
            cells.append(f"{1e3 * time:.3f} {ratio:.3f}")
        table.add_row(provider, *cells)
    return table


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = [tuple(map(int, shape.split("x"))) for shape in BARS]
    add_layer_arguments(parser, shapes, PASSES)
    parser.add_argument("--products", nargs="+", type=float, metavar="MS", default=[5, 20])
    parser.add_argument("--own", nargs="+", type=float, metavar="MS", default=[20])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path, help="write this path with .csv and .json added")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    chosen = parse_arguments(given)
    console = Console(width=None if sys.stdout.isatty() else 170)
    works = [Work(1e-3 * each, own=own) for own in (False, True) for each in (chosen.own if own else chosen.products)]
    known = {DENSE: structured_layers.dense(), **structured_layers.structured(chosen.masks)}
    providers = {name: known[name] for name in (DENSE, *chosen.providers)}
    rows: list[Row] = []
    for tokens, *of_layer in chosen.shapes:
        for passes in chosen.passes:
            case = Case(tokens, LayerSizes(*of_layer), "bfloat16", "cuda", passes == PASSES[True])
            with torch._dynamo.config.patch(recompile_limit=64):
                calls = {name: call for name, _, call in warm_calls(case, providers, console.print)}
                found = measure_case(case, calls, works, chosen.repeats)
            console.print(case_table(case, found, works))
            rows += found
            if chosen.output:
                command = recording.command_line("benchmarks.work_before", given)
                recording.write(chosen.output, rows, environment=measure.environment("cuda"), command=command)
    return 0


if __name__ == "__main__":
    sys.exit(main())

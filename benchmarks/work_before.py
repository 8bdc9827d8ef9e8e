"""What the work that stands before a call does to its time: the layers of structured_linear behind other works.

In one process and in rotation each call is timed behind square products of so many milliseconds, and behind its own
calls for so long, as in a model of such layers alone, with products ahead of those while the host launches them.
"x dense" is of dense calls behind the same work.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import recording, structured_layers
from benchmarks.arguments import sizes
from benchmarks.busy import MARGIN, times_behind_work, work_for
from benchmarks.recording import Row
from benchmarks.structured_case import PASSES, Case, make_inputs, make_layer, step
from benchmarks.structured_layers import BARS, DENSE, OURS, Place
from structfly import measure
from structfly.errors import ArgumentError
from structfly.records.layer import LayerSizes

KERNEL = "work_before"
_WARM = 4  # calls of a form, after which it is replayed

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
    times: dict[Turn, list[float]] = {each: [] for each in before}
    order, shuffle = list(before), random.Random(0).shuffle
    for turn in range(2 + repeats):
        shuffle(order)
        for each in order:
            call = {"": calls[each[0]]}
            timed = measure.times_in_rotation(call, "cuda", repeats=1, warmups=0, before=before[each])
            if turn >= 2:
                times[each].append(timed[""].median)
    rows = []
    for (name, work), samples in times.items():
        ratios = [d / t for d, t in zip(times[DENSE, work], samples, strict=True)]
        of_metrics = {"time_s": samples, "x_dense": ratios}
        rows += [
            Row.of_timing(
                measure.summarize(values),
                kernel=KERNEL,
                provider=name,
                mode=f"{case.mode}, behind {work}",
                metric=metric,
            )
            for metric, values in of_metrics.items()
        ]
    return rows


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
            time, ratio = (values[provider, f"{case.mode}, behind {work}", each] for each in ("time_s", "x_dense"))
            cells.append(f"{1e3 * time:.3f} {ratio:.3f}")
        table.add_row(provider, *cells)
    return table


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = [tuple(map(int, shape.split("x"))) for shape in BARS]
    parser.add_argument("--shapes", nargs="+", type=sizes("tokens x in x out"), metavar="TOKENSxINxOUT", default=shapes)
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--providers", nargs="+", choices=OURS, metavar="NAME", default=list(OURS))
    parser.add_argument("--products", nargs="+", type=float, metavar="MS", default=[5, 20])
    parser.add_argument("--own", nargs="+", type=float, metavar="MS", default=[20])
    parser.add_argument("--masks", type=Path, help="learned masks of the GBLR layers, a result of gblr_training")
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
    rows: list[Row] = []
    for tokens, *of_layer in chosen.shapes:
        for passes in chosen.passes:
            case = Case(tokens, LayerSizes(*of_layer), "bfloat16", "cuda", passes == PASSES[True])
            x, upstream = make_inputs(case)
            calls: dict[str, Callable[[], object]] = {}
            with torch._dynamo.config.patch(recompile_limit=64):
                for name in (DENSE, *chosen.providers):
                    try:
                        layer = make_layer(known[name], case.sizes, Place(case.device, torch.bfloat16))
                    except ArgumentError as problem:
                        console.print(f"{name} is left out: {' '.join(str(problem).split())}")
                        continue
                    calls[name] = partial(step, layer, x, upstream, training=case.training)
                    for _ in range(_WARM):
                        calls[name]()
                found = measure_case(case, calls, works, chosen.repeats)
            console.print(case_table(case, found, works))
            rows += found
            if chosen.output:
                command = recording.command_line("benchmarks.work_before", given)
                recording.write(chosen.output, rows, environment=measure.environment("cuda"), command=command)
    return 0


if __name__ == "__main__":
    sys.exit(main())

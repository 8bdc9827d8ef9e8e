"""What a step of a structured layer is made of: each kernel's time, beside what its arithmetic and its memory take.

Steps are those of benchmarks.structured_linear, warm, one after another, traced by torch.profiler.  "multiplying" is
what the step's multiply-adds take at the rate of a large square product, "moving" what x, y and their gradients take
at that of a large copy, each read or written once for every product that needs it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import recording, structured_layers
from benchmarks.device_trace import Kernel, read_kernels, trace_of
from benchmarks.matmul import matmul_rate
from benchmarks.recording import Row
from benchmarks.structured_case import PASSES, Case, Layer, add_layer_arguments, warm_calls
from benchmarks.structured_layers import DENSE
from structfly import measure
from structfly.records.layer import LayerSizes

KERNEL = "structured_kernels"
_COPIED = 2**30  # bytes, that a copy reads and writes


class Rates(NamedTuple):
    """Of a device: multiply-adds times two, and bytes, a second."""

    flops: float
    bytes: float


def copy_rate(repeats: int) -> Row:
    """Bytes that a large copy reads and writes, a second."""
    source = torch.empty(_COPIED // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    timing = measure.median_time(lambda: target.copy_(source), "cuda", repeats=repeats)
    rates = measure.summarize([_COPIED / seconds for seconds in timing.samples])
    return Row.of_timing(rates, kernel="copy", provider="torch", mode=f"{_COPIED // 2} bytes", metric="rate_byte_per_s")


def least(case: Case, layer: Layer, rates: Rates) -> dict[str, float]:
    """Seconds of a step's multiply-adds, and of moving what is its own.

    Forward reads x and writes y; backward reads the gradient of y twice and x once, and writes that of x.
    """
    flops = 2 * case.tokens * case.sizes.parameters / layer.allowed * (3 if case.training else 1)
    inside, outside = (3, 3) if case.training else (1, 1)
    features = inside * case.sizes.in_features + outside * case.sizes.out_features
    moved = case.tokens * features * getattr(torch, case.dtype).itemsize
    return {"multiplying_s": flops / rates.flops, "moving_s": moved / rates.bytes}


def rows_of(case: Case, provider: str, kernels: Sequence[Kernel], bounds: dict[str, float]) -> list[Row]:
    """Those of each kernel, numbered in order, and of what bounds their sum."""
    rows = [
        Row.of_timing(
            measure.summarize(list(each.seconds)),
            kernel=KERNEL,
            provider=provider,
            mode=case.mode,
            metric=f"device_s of {number}: {each.name[:80]}",
        )
        for number, each in enumerate(kernels, 1)
    ]
    return rows + [
        Row.of_value(value, kernel=KERNEL, provider=provider, mode=case.mode, metric=metric)
        for metric, value in bounds.items()
    ]


def table_of(rows: Sequence[Row]) -> Table:
    """The kernels of one step; runs of the same kernel are one line."""
    first = rows[0]
    table = Table(title=f"{first.provider}: {first.mode}", title_justify="left")
    for heading, justify in (("kernel", "left"), ("launches", "right"), ("us", "right")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    merged: list[tuple[str, int, float]] = []
    for row in rows:
        name = row.metric.partition(": ")[2] or row.metric
        if merged and merged[-1][0] == name:
            name, launches, seconds = merged.pop()
            merged.append((name, launches + 1, seconds + row.p50))
        else:
            merged.append((name, 1, row.p50))
    for name, launches, seconds in merged:
        table.add_row(name[:60], str(launches), f"{seconds * 1e6:.1f}")
    total = sum(row.p50 for row in rows if row.metric.startswith("device_s"))
    table.add_row("all kernels", "", f"{total * 1e6:.1f}")
    return table


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_layer_arguments(parser, [(16384, 4096, 4096)], [PASSES[True]])
    parser.add_argument("--calls", type=int, default=10, help="traced steps of each layer")
    parser.add_argument("--output", type=Path, help="write this path with .csv and .json added")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    chosen = parse_arguments(given)
    console = Console(width=None if sys.stdout.isatty() else 120)
    known = {DENSE: structured_layers.dense(), **structured_layers.structured(chosen.masks)}
    providers = {name: known[name] for name in (DENSE, *chosen.providers)}
    measured = [matmul_rate("cuda", "bfloat16", 8192, chosen.calls), copy_rate(chosen.calls)]
    rates = Rates(*(row.p50 for row in measured))
    rows: list[Row] = []
    with torch._dynamo.config.patch(recompile_limit=64):
        for tokens, *of_layer in chosen.shapes:
            for passes in chosen.passes:
                case = Case(tokens, LayerSizes(*of_layer), "bfloat16", "cuda", passes == PASSES[True])
                for name, layer, call in warm_calls(case, providers, console.print):
                    kernels = read_kernels(trace_of(call, chosen.calls), chosen.calls)
                    found = rows_of(case, name, kernels, least(case, layer, rates))
                    console.print(table_of(found))
                    rows += found
    if chosen.output:
        command = recording.command_line("benchmarks.structured_kernels", given)
        recording.write(chosen.output, [*measured, *rows], environment=measure.environment("cuda"), command=command)
    return 0


if __name__ == "__main__":
    sys.exit(main())

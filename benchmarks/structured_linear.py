"""Structured linear layers against the dense one: time, peak extra memory and error of each, forward and backward.

Every layer is the module that a user has, without bias, compiled as a user compiles it; peers are compiled by Inductor
or, where their packages say nothing of that, eager.  Times are taken in one process, the providers in rotation; those
of a GPU behind products that keep it busy, as the layers before it do within a model: what the host takes to launch is
no part of them, up to 5 ms.  It stands beside them; benchmarks.structured_model has whole models, where it counts.
"x dense" is the median over rounds of the dense layer's time over the provider's.  Errors are relative Frobenius errors
against the layer's own dense weight in float64.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import busy, recording, structured_layers
from benchmarks.arguments import fill_in
from benchmarks.head import precision
from benchmarks.matmul import matmul_rate
from benchmarks.recording import Row
from benchmarks.structured_case import (
    PASSES,
    Case,
    Layer,
    add_case_arguments,
    clear,
    errors,
    make_inputs,
    make_layer,
    peak_memory,
    step,
    x_dense,
)
from benchmarks.structured_layers import BARS, DENSE, OURS, Place, Provider
from benchmarks.structured_peers import PEERS
from structfly import measure
from structfly.errors import ArgumentError
from structfly.records.layer import LayerSizes

KERNEL = "structured_linear"
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"shapes": [(1024, 512, 2048)], "dtype": "float32", "matmul": 1024},
    "cuda": {"shapes": [tuple(map(int, shape.split("x"))) for shape in BARS], "dtype": "bfloat16", "matmul": 8192},
}


@contextmanager
def precise(*, tf32: bool = False) -> Iterator[None]:
    """Products of float32 in float32, or if ``tf32`` in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision(tf32=tf32))
    yield
    torch.set_float32_matmul_precision(before)


def wanted(provider: str, case: Case, ratios: Mapping[str, float], allowed: float) -> float | None:
    """How many times as fast as the dense layer a provider must be, or None where no bar is known."""
    bar = case.bars.get(provider)
    if bar is None or bar.base not in ratios:
        return None
    factor = bar.training if case.training else bar.forward
    return max(factor * ratios[bar.base], bar.of_fill * allowed)


def layers_of(
    case: Case, providers: Mapping[str, Provider], x: Tensor, upstream: Tensor, say: Callable[[str], object]
) -> tuple[dict[str, Layer], list[Row]]:
    """The layers that can be had, each run once, and their rows of errors and parameters."""
    place = Place(case.device, getattr(torch, case.dtype))
    layers: dict[str, Layer] = {}
    rows: list[Row] = []
    for name, provider in providers.items():
        if case.training and not provider.trains:
            continue
        try:
            layer = make_layer(provider, case.sizes, place)
            y = step(layer, x, upstream, training=case.training)
        except Exception as problem:  # of peers it may be any
            if name in (*OURS, DENSE) and not isinstance(problem, ArgumentError):
                raise
            say(f"{name} is left out: {type(problem).__name__}: {' '.join(str(problem).split())[:300]}")
            continue
        layers[name] = layer
        found = errors(layer, y, x, upstream, training=case.training)
        for metric, value in (
            *((f"relative_error_{what}", error) for what, error in found.items()),
            ("share_of_parameters", layer.share_of_parameters),
        ):
            rows.append(Row.of_value(value, kernel=KERNEL, provider=name, mode=case.mode, metric=metric))
        del y
        clear(layer, x)
    return layers, rows


def measure_case(
    case: Case,
    providers: Mapping[str, Provider],
    repeats: int,
    say: Callable[[str], object],
) -> list[Row]:
    """All rows of one case; providers that cannot be had are left out, which is said with the reason."""
    x, upstream = make_inputs(case)
    torch.compiler.reset()
    layers, rows = layers_of(case, providers, x, upstream, say)
    calls = {name: partial(step, layer, x, upstream, training=case.training) for name, layer in layers.items()}
    timings, host = busy.times_behind_work(calls, case.device, repeats=repeats, longest=busy.LONGEST)
    rows += busy.host_rows(KERNEL, case.mode, host)
    ratios = {name: x_dense(timings[DENSE], timing) for name, timing in timings.items()}
    medians = {name: each.median for name, each in ratios.items()}
    for layer in layers.values():
        clear(layer, x)
    for name, layer in layers.items():
        rows.append(Row.of_timing(timings[name], kernel=KERNEL, provider=name, mode=case.mode))
        rows.append(Row.of_timing(ratios[name], kernel=KERNEL, provider=name, mode=case.mode, metric="x_dense"))
        values = {"x_dense_wanted": wanted(name, case, medians, layer.allowed)}
        if case.device == "cuda":
            values["peak_extra_bytes"] = peak_memory(layer, x, upstream, training=case.training)
        for metric, value in values.items():
            if value is not None:
                rows.append(Row.of_value(value, kernel=KERNEL, provider=name, mode=case.mode, metric=metric))
    return rows


def case_table(rows: Sequence[Row]) -> Table:
    """The providers of one case, and whether they reach their bars."""
    values = {(row.provider, row.metric): row for row in rows}

    def show(provider: str, metric: str, form: str, unit: float = 1.0) -> str:
        return format(values[provider, metric].p50 / unit, form) if (provider, metric) in values else ""

    table = Table(title=rows[0].mode, title_justify="left")
    table.add_column("provider")
    for heading in ("parameters", "ms (p20 to p80)", "x dense", "wanted", "reached", "host ms", "extra MiB", "x dense"):
        table.add_column(heading, justify="right")
    table.add_column("error: y, dx, factors", justify="right")
    for provider in dict.fromkeys(row.provider for row in rows):
        time = values[provider, "time_s"]
        memory = values.get((provider, "peak_extra_bytes"))
        table.add_row(
            provider,
            show(provider, "share_of_parameters", ".1%"),
            f"{time.p50 * 1e3:.3f} ({time.p20 * 1e3:.3f} to {time.p80 * 1e3:.3f})",
            show(provider, "x_dense", ".2f"),
            show(provider, "x_dense_wanted", ".2f"),
            _reached(values, provider),
            show(provider, "host_s", ".2f", 1e-3),
            show(provider, "peak_extra_bytes", ".0f", 2**20),
            f"{memory.p50 / values[DENSE, 'peak_extra_bytes'].p50:.3f}" if memory else "",
            " ".join(show(provider, f"relative_error_{name}", ".1e") for name in ("y", "dx", "dfactors")).strip(),
        )
    return table


def _reached(values: Mapping[tuple[str, str], Row], provider: str) -> str:
    if (provider, "x_dense_wanted") not in values:
        return ""
    return "yes" if values[provider, "x_dense"].p50 >= values[provider, "x_dense_wanted"].p50 else "NO"


def misses(rows: Sequence[Row]) -> list[str]:
    """Bars that were not reached: of time and, in training, of memory that is less than the dense layer's."""
    values = {(row.mode, row.provider, row.metric): row.p50 for row in rows}
    lines = []
    for (mode, provider, metric), bar in values.items():
        if metric != "x_dense_wanted":
            continue
        if (found := values[mode, provider, "x_dense"]) < bar:
            lines.append(f"{mode}: {provider} is {found:.2f} x dense, must be {bar:.2f}")
        mine, other = (values.get((mode, each, "peak_extra_bytes"), 0.0) for each in (provider, DENSE))
        if mode.endswith(PASSES[True]) and mine >= other > 0:
            lines.append(f"{mode}: {provider} takes {mine / other:.3f} of the dense layer's memory, must be below 1")
    return lines


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; what is not given depends on the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = (*OURS, *PEERS)
    add_case_arguments(parser, DEFAULTS)
    parser.add_argument(
        "--providers",
        nargs="+",
        choices=names,
        metavar="NAME",
        default=list(names),
        help=f"those besides the dense layer: {', '.join(map(repr, names))}".replace("%", "%%"),
    )
    parser.add_argument("--tf32", action="store_true", help="products of float32 may round their operands to TF32")
    parser.add_argument("--masks", type=Path, help="learned masks of the GBLR layers, a result of gblr_training")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path, help="write this path with .csv and .json added")
    chosen = parser.parse_args(arguments)
    fill_in(chosen, DEFAULTS[chosen.device])
    if chosen.tf32 and chosen.dtype != "float32":
        parser.error(f"--tf32 is about products of float32; --dtype is {chosen.dtype}")
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    given = sys.argv[1:] if arguments is None else arguments
    chosen = parse_arguments(given)
    console = Console(width=None if sys.stdout.isatty() else 170)
    known = {DENSE: structured_layers.dense(), **structured_layers.structured(chosen.masks), **PEERS}
    providers = {name: known[name] for name in (DENSE, *chosen.providers)}
    environment = measure.environment(chosen.device)
    command = recording.command_line("benchmarks.structured_linear", given)
    rows: list[Row] = []
    many = torch._dynamo.config.patch(recompile_limit=64)  # layers share the code of one module
    with precise(tf32=chosen.tf32), many:
        rate = matmul_rate(chosen.device, chosen.dtype, chosen.matmul, chosen.repeats)
        console.print(f"{rate.mode} matmul: {rate.p50 * 1e-12:.3g} TFLOP/s")
        for tokens, *of_layer in chosen.shapes:
            for passes in chosen.passes:
                training = passes == PASSES[True]
                case = Case(tokens, LayerSizes(*of_layer), chosen.dtype, chosen.device, training, chosen.tf32)
                measured = measure_case(case, providers, chosen.repeats, console.print)
                console.print(case_table(measured))
                rows += measured
                if chosen.output:  # after each, so that a run that is stopped leaves what it found
                    recording.write(chosen.output, [rate, *rows], environment=environment, command=command)
    for line in misses(rows):
        console.print(line, highlight=False, style="red")
    console.print(" | ".join(f"{key} {value}" for key, value in environment.items()), soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Structured layers written in plain torch, as users have them: compiled by Inductor alone, and by structfly.

Every layer is compiled as it stands, without a budget; what structfly recognises it rewrites exactly, and what it made
of a layer is printed.  The dense layer of the same sizes, compiled by Inductor, is beside them.  Times are taken in one
process, the providers in rotation; those of a GPU behind products that keep it busy.  Errors are relative Frobenius
errors against the layer itself in float64.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import structfly
from benchmarks import busy, recording
from benchmarks.accuracy import relative_error
from benchmarks.arguments import fill_in
from benchmarks.matmul import matmul_rate
from benchmarks.recording import Row
from benchmarks.structured_case import PASSES, Case, Layer, add_case_arguments, clear, make_inputs, peak_memory, step
from benchmarks.structured_layers import Place
from benchmarks.structured_linear import precise
from structfly import measure
from structfly.records.layer import LayerSizes

KERNEL = "recognised"
DENSE, INDUCTOR, STRUCTFLY = "dense", "inductor", "structfly"
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"shapes": [(1024, 512, 512)], "dtype": "float32", "matmul": 1024},
    "cuda": {"shapes": [(16384, 4096, 4096)], "dtype": "bfloat16", "matmul": 8192},
}
SHARE = 1 / 4  # of the weight's entries or of the parameters, where a layer has a choice


class Masked(nn.Module):
    """A weight times a constant mask that keeps a quarter of the blocks, of 256 x 256 or of an eighth of a side."""

    mask: Tensor

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__()
        cell = min(256, min(sizes) // 8)
        kept = torch.rand(sizes.out_features // cell, sizes.in_features // cell)
        kept = kept <= kept.flatten().kthvalue(round(SHARE * kept.numel())).values
        self.weight = nn.Parameter(torch.randn(sizes[::-1]) / (SHARE * sizes.in_features) ** 0.5)
        self.register_buffer("mask", kept.repeat_interleave(cell, 0).repeat_interleave(cell, 1).float())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask)


class Monarch(nn.Module):
    """Two batched products with Monarch's permutation between, by einsum."""

    def __init__(self, blocks: int, sizes: LayerSizes) -> None:
        super().__init__()
        inputs, outputs = (side // blocks for side in sizes)
        middle = min(inputs, outputs)
        self.first = nn.Parameter(torch.randn(blocks, middle, inputs) / inputs**0.5)
        self.second = nn.Parameter(torch.randn(blocks, outputs, middle) / middle**0.5)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.einsum("nkp,kqp->nkq", x.unflatten(1, (len(self.first), -1)), self.first)
        z = z.flatten(1).unflatten(1, (-1, len(self.second))).transpose(1, 2)
        return torch.einsum("nlr,lsr->nls", z, self.second).transpose(1, 2).flatten(1)


class Gblr(nn.Module):
    """Generalised block low rank whose dense weight is made at every call: as many components as the smaller side has,
    each under an interval of inputs and one of outputs, a quarter of the dense parameters in all."""

    rows: Tensor
    columns: Tensor

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__()
        components = min(sizes)
        share = SHARE * sizes.parameters / (components * sum(sizes))
        self.right = nn.Parameter(torch.randn(components, sizes.in_features) / sizes.in_features**0.5)
        self.left = nn.Parameter(torch.randn(sizes.out_features, components) / (components**0.5 * share))
        for name, side in (("columns", sizes.in_features), ("rows", sizes.out_features)):
            starts, width = torch.randint(side, (components, 1)), round(share * side)
            self.register_buffer(name, ((torch.arange(side) - starts) % side < width).float())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.left * self.rows.t()) @ (self.right * self.columns))


class LowRank(nn.Module):
    """A product of two thin matrices, made at every call: a quarter of the dense parameters."""

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__()
        rank = round(SHARE * sizes.parameters / sum(sizes))
        self.right = nn.Parameter(torch.randn(rank, sizes.in_features) / sizes.in_features**0.5)
        self.left = nn.Parameter(torch.randn(sizes.out_features, rank) / rank**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.left @ self.right)


class Butterfly(nn.Module):
    """Stages of 2 x 2 matrices at strides that double, each a sum of elementwise products."""

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__()
        features = sizes.in_features
        if features != sizes.out_features or features & (features - 1):
            raise structfly.errors.ArgumentError(f"a butterfly of {sizes}: as many outputs as inputs, a power of two")
        self.twiddle = nn.Parameter(torch.randn(features.bit_length() - 1, features // 2, 2, 2) / 2**0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for number, twiddle in enumerate(self.twiddle):
            stride = 1 << number
            blocks = x.shape[1] // (2 * stride)
            matrices = twiddle.view(blocks, stride, 2, 2).permute(0, 2, 3, 1)
            y = (matrices * y.reshape(len(x), blocks, 1, 2, stride)).sum(3)
        return y.reshape(x.shape)


LAYERS: Mapping[str, Callable[[LayerSizes], nn.Module]] = {
    "masked linear, a quarter": Masked,
    "monarch 4, einsum": partial(Monarch, 4),
    "monarch 16, einsum": partial(Monarch, 16),
    "gblr, dense weight": Gblr,
    "low rank, dense weight": LowRank,
    "butterfly": Butterfly,
}


def made(build: Callable[[LayerSizes], nn.Module], sizes: LayerSizes, place: Place) -> nn.Module:
    """The same one every time."""
    torch.manual_seed(0)
    return build(sizes).to(place.device, place.dtype)


def compiled(module: nn.Module, backend: str) -> Layer:
    """A copy of the layer that is compiled."""
    module = copy.deepcopy(module)
    return Layer(module, torch.compile(module, backend=backend, fullgraph=True, dynamic=False), True)


def errors(layer: Layer, y: Tensor, x: Tensor, upstream: Tensor, *, training: bool) -> dict[str, float]:
    """Of a step that was made: of y and, in training, of dx and of the parameter whose gradient is farthest off."""
    exact = copy.deepcopy(layer.module).double()
    wide = x.detach().double().requires_grad_(training)
    with torch.set_grad_enabled(training):
        value = exact(wide)
    found = {"y": relative_error(y, value.detach())}
    if training:
        of_x, *of_factors = torch.autograd.grad(value, [wide, *exact.parameters()], upstream.double())
        found["dx"] = relative_error(_gradient(x), of_x)
        mine = map(_gradient, layer.module.parameters())
        found["dfactors"] = max(map(relative_error, mine, of_factors))
    return found


def _gradient(tensor: Tensor) -> Tensor:
    if tensor.grad is None:
        raise ValueError("the step left no gradient; run its backward first")
    return tensor.grad


def rewritten_to(module: nn.Module, x: Tensor, *, training: bool) -> str:
    """What structfly made of a layer: the rule, and the candidate or the reason why there is none."""
    with torch.set_grad_enabled(training):
        sites = structfly.explain(module)(x).sites
    return "; ".join(f"{site.rule}: {site.candidate if site.status == 'rewritten' else site.reason}" for site in sites)


def measure_case(
    case: Case,
    names: Sequence[str],
    repeats: int,
    say: Callable[[str], object],
) -> list[Row]:
    """All rows of one case, layer by layer; layers that cannot be had of these sizes are left out, which is said."""
    x, upstream = make_inputs(case)
    place = Place(case.device, getattr(torch, case.dtype))
    rows: list[Row] = []
    torch.compiler.reset()
    dense = compiled(made(lambda sizes: nn.Linear(*sizes, bias=False), case.sizes, place), "inductor")
    for name in names:
        try:
            module = made(LAYERS[name], case.sizes, place)
        except structfly.errors.ArgumentError as problem:
            say(f"{name} is left out: {problem}")
            continue
        say(f"{case.mode}: {name}: {rewritten_to(module, x, training=case.training)}")
        layers = {DENSE: dense, INDUCTOR: compiled(module, "inductor"), STRUCTFLY: compiled(module, "structfly")}
        rows += _measured(name, layers, case, x, upstream, repeats)
    return rows


def _measured(
    name: str,
    layers: Mapping[str, Layer],
    case: Case,
    x: Tensor,
    upstream: Tensor,
    repeats: int,
) -> list[Row]:
    rows: list[Row] = []

    def add(provider: str, metric: str, value: float) -> None:
        rows.append(Row.of_value(value, kernel=name, provider=provider, mode=case.mode, metric=metric))

    for provider, layer in layers.items():
        y = step(layer, x, upstream, training=case.training)
        for what, error in errors(layer, y, x, upstream, training=case.training).items():
            add(provider, f"relative_error_{what}", error)
        del y
        clear(layer, x)
    calls = {provider: partial(step, layer, x, upstream, training=case.training) for provider, layer in layers.items()}
    timings, host = busy.times_behind_work(calls, case.device, repeats=repeats)
    rows += busy.host_rows(name, case.mode, host)
    for layer in layers.values():
        clear(layer, x)
    for provider, timing in timings.items():
        rows.append(Row.of_timing(timing, kernel=name, provider=provider, mode=case.mode))
        samples = [base / own for base, own in zip(timings[INDUCTOR].samples, timing.samples, strict=True)]
        ratio = measure.summarize(samples)
        rows.append(Row.of_timing(ratio, kernel=name, provider=provider, mode=case.mode, metric="x_inductor"))
        if case.device == "cuda":
            add(provider, "peak_extra_bytes", peak_memory(layers[provider], x, upstream, training=case.training))
    return rows


def case_table(rows: Sequence[Row]) -> Table:
    """The layers of one case, by provider."""
    values = {(row.kernel, row.provider, row.metric): row for row in rows}

    def show(layer: str, provider: str, metric: str, form: str, unit: float = 1.0) -> str:
        row = values.get((layer, provider, metric))
        return "" if row is None else format(row.p50 / unit, form)

    table = Table(title=rows[0].mode, title_justify="left")
    table.add_column("layer")
    table.add_column("compiled by")
    for heading in ("ms (p20 to p80)", "x Inductor", "extra MiB", "error: y, dx, factors"):
        table.add_column(heading, justify="right")
    for layer, provider in dict.fromkeys((row.kernel, row.provider) for row in rows):
        time = values[layer, provider, "time_s"]
        table.add_row(
            layer if provider != DENSE else f"{DENSE} of the same sizes",
            provider if provider != DENSE else INDUCTOR,
            f"{time.p50 * 1e3:.3f} ({time.p20 * 1e3:.3f} to {time.p80 * 1e3:.3f})",
            show(layer, provider, "x_inductor", ".2f"),
            show(layer, provider, "peak_extra_bytes", ".0f", 2**20),
            " ".join(
                show(layer, provider, f"relative_error_{what}", ".1e") for what in ("y", "dx", "dfactors")
            ).strip(),
        )
    return table


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; what is not given depends on the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_case_arguments(parser, DEFAULTS)
    parser.add_argument("--layers", nargs="+", choices=LAYERS, metavar="NAME", default=list(LAYERS))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path, help="write this path with .csv and .json added")
    chosen = parser.parse_args(arguments)
    return fill_in(chosen, DEFAULTS[chosen.device])


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    given = sys.argv[1:] if arguments is None else arguments
    chosen = parse_arguments(given)
    console = Console(width=None if sys.stdout.isatty() else 150)
    environment = measure.environment(chosen.device)
    command = recording.command_line("benchmarks.recognised", given)
    rows: list[Row] = []
    with precise():
        rate = matmul_rate(chosen.device, chosen.dtype, chosen.matmul, chosen.repeats)
        console.print(f"{rate.mode} matmul: {rate.p50 * 1e-12:.3g} TFLOP/s")
        for tokens, *of_layer in chosen.shapes:
            for passes in chosen.passes:
                case = Case(tokens, LayerSizes(*of_layer), chosen.dtype, chosen.device, passes == PASSES[True])
                measured = measure_case(case, chosen.layers, chosen.repeats, console.print)
                if measured:
                    console.print(case_table(measured))
                rows += measured
                if chosen.output:  # after each, so that a run that is stopped leaves what it found
                    recording.write(chosen.output, [rate, *rows], environment=environment, command=command)
    console.print(" | ".join(f"{key} {value}" for key, value in environment.items()), soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

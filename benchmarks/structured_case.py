"""One structured layer under test: what it is, a step of it, and that step's memory and errors."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.accuracy import relative_error
from benchmarks.arguments import sizes
from benchmarks.structured_layers import BARS, OURS, Bar, Place, Provider, dense_weight
from structfly import StructuredLinear, measure
from structfly.errors import ArgumentError
from structfly.records.layer import LayerSizes

PASSES = ("forward", "forward+backward")


WARM = 4
"""Calls of a layer after which it is replayed."""


def add_case_arguments(parser: argparse.ArgumentParser, devices: Iterable[str]) -> None:
    """The options that say which cases are measured."""
    parser.add_argument("--device", choices=devices, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    _add_shapes_and_passes(parser, None, PASSES)


def add_layer_arguments(
    parser: argparse.ArgumentParser, shapes: Sequence[Sequence[int]], passes: Sequence[str]
) -> None:
    """The options that say which of structfly's layers are measured on a GPU, and their defaults."""
    _add_shapes_and_passes(parser, shapes, passes)
    parser.add_argument("--providers", nargs="+", choices=OURS, metavar="NAME", default=list(OURS))
    parser.add_argument("--masks", type=Path, help="learned masks of the GBLR layers, a result of gblr_training")


def _add_shapes_and_passes(
    parser: argparse.ArgumentParser, shapes: Sequence[Sequence[int]] | None, passes: Sequence[str]
) -> None:
    kind = sizes("tokens x in x out")
    parser.add_argument("--shapes", nargs="+", type=kind, metavar="TOKENSxINxOUT", default=shapes)
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(passes))


@dataclass(frozen=True)
class Case:
    """One problem: x (tokens, in), of which and of the factors gradients are taken in training.

    ``tf32``: products of float32 may round their operands to TF32.
    """

    tokens: int
    sizes: LayerSizes
    dtype: str
    device: str
    training: bool
    tf32: bool = False

    @property
    def shape(self) -> str:
        """As the command line writes it."""
        return f"{self.tokens}x{self.sizes.in_features}x{self.sizes.out_features}"

    @property
    def mode(self) -> str:
        """The conditions in one line."""
        return f"{self.shape} {self.dtype}{' as TF32' * self.tf32}, {PASSES[self.training]}"

    @property
    def bars(self) -> Mapping[str, Bar]:
        """By provider, where there are any."""
        return BARS.get(self.shape, {}) if (self.dtype, self.device) == ("bfloat16", "cuda") else {}


@dataclass(frozen=True)
class Layer:
    """A layer, and what runs it."""

    module: nn.Module
    run: Callable[[Tensor], Tensor]
    trains: bool

    @property
    def share_of_parameters(self) -> float:
        """Of the dense ones."""
        weight = dense_weight(self.module)
        if self.trains:
            return sum(p.numel() for p in self.module.parameters()) / weight.numel()
        return float((weight != 0).sum()) / weight.numel()

    @property
    def allowed(self) -> float:
        """How many times as fast as the dense layer its multiply-adds allow it to be, 1 for what is not structured."""
        if not isinstance(self.module, StructuredLinear):
            return 1.0
        dtype = next(self.module.parameters()).dtype
        flops = self.module.structure.cost(self.module.sizes, dtype).at(1)["flops"]
        return 2 * self.module.sizes.parameters / flops


def make_layer(provider: Provider, sizes: LayerSizes, place: Place) -> Layer:
    """The same one every time."""
    torch.manual_seed(0)
    module = provider.build(sizes, place)
    if provider.backend is None:
        return Layer(module, module, provider.trains)
    compiled = torch.compile(module, backend=provider.backend, fullgraph=True, dynamic=False)
    return Layer(module, compiled, provider.trains)


def make_inputs(case: Case) -> tuple[Tensor, Tensor]:
    """x (tokens, in) and the gradient with respect to y (tokens, out)."""
    generator = torch.Generator(case.device).manual_seed(1)
    x, upstream = (
        torch.randn(case.tokens, features, generator=generator, device=case.device).to(getattr(torch, case.dtype))
        for features in case.sizes
    )
    return x.requires_grad_(), upstream


def step(layer: Layer, x: Tensor, upstream: Tensor, *, training: bool) -> Tensor:
    """y, and in training fresh gradients of x and of all parameters."""
    if not training:
        with torch.no_grad():
            return layer.run(x)
    clear(layer, x)
    y = layer.run(x)
    y.backward(upstream)
    return y


def warm_calls(
    case: Case, providers: Mapping[str, Provider], say: Callable[[str], object]
) -> Iterator[tuple[str, Layer, Callable[[], Tensor]]]:
    """Steps of each provider's layer that has been called often enough; what fits no such layer is said."""
    x, upstream = make_inputs(case)
    for name, provider in providers.items():
        try:
            layer = make_layer(provider, case.sizes, Place(case.device, getattr(torch, case.dtype)))
        except ArgumentError as problem:
            say(f"{name} is left out: {' '.join(str(problem).split())}")
            continue
        call = partial(step, layer, x, upstream, training=case.training)
        for _ in range(WARM):
            call()
        yield name, layer, call


def x_dense(dense: measure.Timing, mine: measure.Timing) -> measure.Timing:
    """How many times as fast as the dense layer each round was."""
    return measure.summarize([d / t for d, t in zip(dense.samples, mine.samples, strict=True)])


def clear(layer: Layer, x: Tensor) -> None:
    """Take the gradients away."""
    x.grad = None
    layer.module.zero_grad(set_to_none=True)


def errors(layer: Layer, y: Tensor, x: Tensor, upstream: Tensor, *, training: bool) -> dict[str, float]:
    """Of a step that was made: of y and, in training, of dx and of the parameter whose gradient is farthest off.

    Parameters of one number are left out: the terms of their gradients cancel, so that an error relative to the sum
    means nothing.
    """
    exact = copy.deepcopy(layer.module).double().requires_grad_(training)
    weight = dense_weight(exact)
    wide = x.detach().double()
    found = {"y": relative_error(y, wide @ weight.detach().t())}
    if training:
        above = upstream.double()
        found["dx"] = relative_error(_gradient(x), above @ weight.detach())
        of_factors = torch.autograd.grad(weight, list(exact.parameters()), above.t() @ wide)
        found["dfactors"] = max(
            relative_error(_gradient(mine), reference)
            for mine, reference in zip(layer.module.parameters(), of_factors, strict=True)
            if mine.numel() > 1
        )
    return found


def _gradient(tensor: Tensor) -> Tensor:
    if tensor.grad is None:
        raise ValueError("the step left no gradient; run its backward first")
    return tensor.grad


def peak_memory(layer: Layer, x: Tensor, upstream: Tensor, *, training: bool) -> int:
    """Bytes of a warm step on a GPU above weights, x and the gradient that comes in."""
    clear(layer, x)
    peak = measure.peak_extra_memory(partial(step, layer, x, upstream, training=training), x.device, warmups=0)
    clear(layer, x)
    return peak

"""What is known of one linear layer: its sizes, what data said of it, and what one way of making its weight costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import sympy
import torch
from torch import Tensor

from structfly.records.cost import Expression, Stage

TOKENS = sympy.Symbol("tokens", integer=True, positive=True)
"""Rows that a layer is applied to, in its costs."""


class LayerSizes(NamedTuple):
    """A linear layer y = W x + b: ``weight`` (out_features, in_features)."""

    in_features: int
    out_features: int

    @property
    def parameters(self) -> int:
        """Of the dense weight, without the bias."""
        return self.in_features * self.out_features


class Shape(NamedTuple):
    """Layers of one shape take equally long: their sizes, and the dtype of their weights and inputs."""

    sizes: LayerSizes
    dtype: torch.dtype


class AppliedOp(NamedTuple):
    """A structured layer as its op has it: the op's name, the shapes of its factors, and its numbers.

    Layers that agree in these and in their shape take equally long.
    """

    op: str
    factors: tuple[tuple[int, ...], ...]
    static: tuple[int, ...]


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Of layers that are timed."""

Passes: TypeAlias = Literal["forward", "training"]
"""What a time is of: a forward pass without gradients, or a forward and a backward pass that makes all gradients."""

TimeSource: TypeAlias = Literal["roofline", "corrected", "interpolated", "measured"]
"""Where a time comes from: the roofline alone, the roofline and measurements of other layers, its own measurements at
the numbers of tokens on either side, or its own measurement."""

TIMES_FROM: Mapping[TimeSource, str] = {
    "measured": "measured",
    "interpolated": "interpolated between measurements",
    "corrected": "predicted and corrected by measurements",
    "roofline": "predicted by the roofline alone",
}
"""The same in words, the best first."""

OWN_MEASUREMENTS: frozenset[TimeSource] = frozenset(("interpolated", "measured"))
"""Sources that are measurements of the very layer."""


class LayerSeconds(NamedTuple):
    """How long a layer takes, and where that comes from."""

    seconds: float
    source: TimeSource


@dataclass(frozen=True)
class LayerStatistics:
    """What calibration data says of a layer, over the tokens it saw.

    A change dW of the weight changes the output by dW x and, to second order, the loss by
    ``tr(G dW A dW^T) / 2`` a token with A = E[x x^T] and G = E[g g^T], g the gradient of a token's loss with respect
    to the output, where the loss's Hessian is its Fisher matrix and x and g are taken to be independent: K-FAC
    (Martens and Grosse 2015).

    A bias can take up the mean of the change, b - dW E[x], and leaves A = E[x x^T] - E[x] E[x]^T.

    Attributes:
        input_covariance: A (in, in) float32, or None for the identity.
        output_fisher: G (out, out) float32, or None for the identity.
        input_mean: E[x] (in,) float32 where a bias takes that up, else None.
        tokens: how many there were.
    """

    input_covariance: Tensor | None = None
    output_fisher: Tensor | None = None
    input_mean: Tensor | None = None
    tokens: int = 0

    def loss_of(self, change: Tensor) -> float:
        """tr(G dW A dW^T) / 2 of the change dW (out, in) of the weight."""
        left = change if self.output_fisher is None else self.output_fisher.to(change) @ change
        right = change if self.input_covariance is None else change @ self.input_covariance.to(change)
        return 0.5 * float((left.double() * right.double()).sum())


NO_STATISTICS = LayerStatistics()


@dataclass(frozen=True)
class LayerCost:
    """What a layer costs, as sympy expressions in :data:`TOKENS`; the bias is left out, for no structure changes it.

    Attributes:
        parameters: numbers that are learned.
        flops: floating-point operations of a forward pass; a multiply-add counts two.
        weight_bytes: bytes of the factors and of what says where they stand.
        saved_bytes: bytes kept from forward to backward besides the input.
        transient_bytes: bytes taken within the forward pass besides input and output.
        stages: its kernels, for the time.
    """

    parameters: Expression
    flops: Expression
    weight_bytes: Expression
    saved_bytes: Expression
    transient_bytes: Expression
    stages: tuple[Stage, ...]

    def at(self, tokens: int) -> Mapping[str, float]:
        """The numbers for so many tokens, by name."""
        names = ("parameters", "flops", "weight_bytes", "saved_bytes", "transient_bytes")
        return {name: float(sympy.sympify(getattr(self, name)).subs(TOKENS, tokens)) for name in names}


def product(inner: Expression, columns: Expression, dtype: torch.dtype, *, batch: Expression = 1) -> Stage:
    """``batch`` products, in one kernel, of :data:`TOKENS` rows each with a matrix (inner, columns)."""
    moved = batch * (TOKENS * inner + inner * columns + TOKENS * columns) * dtype.itemsize
    return Stage(2 * batch * TOKENS * inner * columns, moved, 1, dtype, TOKENS)

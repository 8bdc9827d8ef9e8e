"""A structured layer as found: a call of its op, with factors that are inputs of the graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from structfly.lowering.layer_op import LayerOp
from structfly.patterns.structure import widened
from structfly.records import Site
from structfly.records.layer import AppliedOp, LayerCost, LayerSizes, Shape


@dataclass(frozen=True)
class MergedSite(Site):
    """One call.

    Attributes:
        call: the op's node; ``node`` is the layer's output.
        op: what it calls.
        x: (*rows, in).
        bias: (out,), or None.
        factors: their values when the graph is compiled.
        places: the numbers of the graph inputs that they are.
        static: the op's numbers.
        shape: of the layer, in the dtype that its products run in.
        rows: of x, at the example's sizes.
    """

    call: fx.Node
    op: LayerOp
    x: fx.Node
    bias: fx.Node | None
    factors: tuple[Tensor, ...] = field(repr=False)
    places: tuple[int, ...]
    static: tuple[int, ...]
    shape: Shape
    rows: int

    @property
    def dead_nodes(self) -> tuple[fx.Node, ...]:
        return (self.call, self.node)

    @property
    def applied(self) -> AppliedOp:
        """What decides how long it takes."""
        return AppliedOp(self.op.name, tuple(tuple(each.shape) for each in self.factors), self.static)

    @property
    def cost(self) -> LayerCost:
        """What it costs as it is, without its time."""
        learned = [each.numel() for each in self.factors if each.is_floating_point()]
        places = sum(each.numel() * each.element_size() for each in self.factors if not each.is_floating_point())
        shapes = [each.shape for each in self.factors]
        return LayerCost(
            parameters=sum(learned),
            flops=2 * sum(self.op.multiply_adds(self.rows, shapes, self.static)),
            weight_bytes=sum(learned) * self.shape.dtype.itemsize + places,
            saved_bytes=0,
            transient_bytes=sum(map(math.prod, self.op.kept_shapes(self.rows, shapes, self.static)))
            * self.shape.dtype.itemsize,
            stages=(),
        )

    def layer(self) -> nn.Module:
        """The layer alone, without its bias, with factors in the dtype that it runs in."""
        return _Layer(self.op, [cast(each, self.shape.dtype) for each in self.factors], self.static)


class _Layer(nn.Module):
    def __init__(self, op: LayerOp, factors: Sequence[Tensor], static: Sequence[int]) -> None:
        super().__init__()
        self.op, self.factors, self.static = op, factors, static

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, self.factors, None, self.static)


def cast(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A factor in ``dtype``; one that says where others stand as it is."""
    return factor.detach().to(dtype) if factor.is_floating_point() else factor


def merged(op: LayerOp, factors: Sequence[Tensor], static: Sequence[int], sizes: LayerSizes) -> Tensor:
    """The dense weight (out, in) of a layer's factors, float32 or wider: what the op makes of the identity's rows."""
    wide = [widened(each.detach()) if each.is_floating_point() else each for each in factors]
    learned = next(each for each in wide if each.is_floating_point())
    identity = torch.eye(sizes.in_features, dtype=learned.dtype, device=learned.device)
    return op(identity, wide, None, static).t()

"""How a masked weight is written: ``W * mask``, ``W.masked_fill(~mask, 0)`` or ``where(mask, W, 0)``, under casts and
transposes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from structfly.rewriter.calls import Call, read
from structfly.rewriter.linear import LinearLike, is_cast, untransposed
from structfly.rewriter.region import example
from structfly.rewriter.writes import written


@dataclass(frozen=True)
class Masked:
    """One reading of a weight that a linear takes.

    Attributes:
        nodes: what stands between the weight and the linear.
        weight: W before it is masked.
        mask: what is 1, or True, where W is kept; where it is left out if ``inverted``.
        inverted: see ``mask``.
        transposed: W is (in, out), as the mask is.
        dtypes: what the masked weight is cast to on its way, in order.
    """

    nodes: tuple[fx.Node, ...]
    weight: fx.Node
    mask: fx.Node
    inverted: bool
    transposed: bool
    dtypes: tuple[torch.dtype, ...]

    def kept(self, mask: Tensor) -> Tensor:
        """The mask (out, in) of what is kept, of the value of ``mask``; a value other than 0 and 1 stays."""
        value = example(self.weight)
        assert value is not None
        shaped = mask.expand(value.shape)
        if self.inverted:
            shaped = ~shaped
        return shaped.t() if self.transposed else shaped


def masked_weights(linear: LinearLike) -> list[Masked]:
    """All readings of what ``linear`` takes as its weight: of a product either factor may be the mask."""
    node, nodes, transposed, dtypes = linear.weight, [*_transposes(linear)], linear.transposed, list[torch.dtype]()
    while (call := read(node)) is not None:
        below = untransposed(node)
        if below is not None:
            transposed = not transposed
        elif is_cast(call):
            value = example(node)
            assert value is not None
            below, dtypes = call["input"], [value.dtype, *dtypes]
        else:
            break
        nodes.append(node)
        node = below
    if call is None or written(node):
        return []
    value = example(node)
    if value is None or value.ndim != 2 or not value.is_floating_point():
        return []
    steps = (*nodes, node)
    found = (
        Masked(steps, weight, mask, inverted, transposed, (value.dtype, *dtypes))
        for weight, mask, inverted in _read(call)
    )
    return [each for each in found if _fits(each, call)]


def _transposes(linear: LinearLike) -> list[fx.Node]:
    """What stands between a linear and its weight."""
    return [node for node in linear.node.all_input_nodes if node not in (linear.x, linear.weight, linear.bias)]


def _read(call: Call) -> Iterator[tuple[fx.Node, fx.Node, bool]]:
    """(weight, mask, whether the mask is True where the weight is left out)."""
    if call.op == "mul":
        pairs = [(call["input"], call["other"], False), (call["other"], call["input"], False)]
    elif call.op == "masked_fill" and _is_zero(call["value"]):
        pairs = [(call["input"], call["mask"], True)]
    elif call.op == "where" and _is_zero(call.get("other")):
        pairs = [(call["input"], call["condition"], False)]
    elif call.op == "where" and _is_zero(call.get("input")):
        pairs = [(call["other"], call["condition"], True)]
    else:
        pairs = []
    for weight, mask, inverted in pairs:
        if isinstance(weight, fx.Node) and isinstance(mask, fx.Node):
            yield weight, mask, inverted


def _is_zero(value: object) -> bool:
    """Whether a value is the number 0, or a tensor made of nothing but that."""
    if isinstance(value, (int, float)):
        return value == 0
    call = read(value)
    if call is None:
        return False
    if call.op in ("zeros", "zeros_like"):
        return True
    filled = {"tensor": "data", "full": "fill_value", "full_like": "fill_value"}
    return call.op in filled and _is_zero(call[filled[call.op]])


def _fits(each: Masked, call: Call) -> bool:
    """A scale, of one number or of one a row, is no mask; a condition may broadcast."""
    product, weight, mask = example(call.node), example(each.weight), example(each.mask)
    if product is None or weight is None or mask is None:
        return False
    if not weight.is_floating_point() or weight.shape != product.shape:
        return False
    if not all(isinstance(size, int) for size in product.shape):
        return False
    return mask.shape == product.shape or call.op != "mul"

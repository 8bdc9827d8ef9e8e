"""How a masked weight is written: ``W * mask``, ``W.masked_fill(~mask, 0)`` or ``where(mask, W, 0)``, under casts and
transposes, and perhaps while it is viewed in blocks: ``(W.view(r, b, c, b) * mask[:, None, :, None]).view(out, in)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from structfly.rewriter.calls import Call, read
from structfly.rewriter.linear import LinearLike, is_cast, untransposed
from structfly.rewriter.region import example
from structfly.rewriter.views import RESHAPES
from structfly.rewriter.writes import written


@dataclass(frozen=True)
class Masked:
    """One reading of a weight that a linear takes.

    Attributes:
        nodes: what stands between the weight and the linear.
        weight: W before it is masked, a matrix.
        shape: in which it is masked; the matrix's numbers are in the same order.
        mask: what is 1, or True, where W is kept; where it is left out if ``inverted``.
        inverted: see ``mask``.
        transposed: W is (in, out), as the mask is.
        dtypes: what the masked weight is cast to on its way, in order.
    """

    nodes: tuple[fx.Node, ...]
    weight: fx.Node
    shape: tuple[int, ...]
    mask: fx.Node
    inverted: bool
    transposed: bool
    dtypes: tuple[torch.dtype, ...]

    def kept(self, mask: Tensor) -> Tensor:
        """The mask (out, in) of what is kept, of the value of ``mask``; a value other than 0 and 1 stays."""
        value = example(self.weight)
        assert value is not None
        shaped = mask.expand(self.shape).reshape(value.shape)
        if self.inverted:
            shaped = ~shaped
        return shaped.t() if self.transposed else shaped


def masked_weights(linear: LinearLike) -> list[Masked]:
    """All readings of what ``linear`` takes as its weight: of a product either factor may be the mask."""
    node, nodes, transposed, dtypes = linear.weight, [*_transposes(linear)], linear.transposed, list[torch.dtype]()
    matrix: torch.Size | None = None  # what the weight is as a matrix, where it is masked in another shape
    while (call := read(node)) is not None:
        below, value = None if matrix else untransposed(node), example(node)
        if below is not None:
            transposed = not transposed
        elif call.op in RESHAPES and value is not None and example(call["input"]) is not None:
            below, matrix = call["input"], matrix or value.shape
        elif is_cast(call) and value is not None:
            below, dtypes = call["input"], [value.dtype, *dtypes]
        else:
            break
        nodes.append(node)
        node = below
    if call is None or written(node):
        return []
    value = example(node)
    if value is None or not value.is_floating_point() or not all(isinstance(size, int) for size in value.shape):
        return []
    found = []
    for weight, mask, inverted in maskings(call):
        views = _views(weight, matrix or value.shape)
        if views is not None and _fits(weight, mask, call):
            steps = (*nodes, node, *views[:-1])
            dtypes_after = (value.dtype, *dtypes)
            found.append(Masked(steps, views[-1], tuple(value.shape), mask, inverted, transposed, dtypes_after))
    return found


def _transposes(linear: LinearLike) -> list[fx.Node]:
    """What stands between a linear and its weight."""
    return [node for node in linear.node.all_input_nodes if node not in (linear.x, linear.weight, linear.bias)]


def maskings(call: Call) -> Iterator[tuple[fx.Node, fx.Node, bool]]:
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


def _views(weight: fx.Node, matrix: torch.Size) -> list[fx.Node] | None:
    """``weight`` and what it is a view of, down to a matrix of this shape; None if there is none."""
    nodes = [weight]
    while (value := example(nodes[-1])) is not None and value.shape != matrix:
        call = read(nodes[-1])
        if call is None or call.op not in RESHAPES:
            return None
        nodes.append(call["input"])
    return nodes if value is not None and value.ndim == 2 else None


def _fits(weight: fx.Node, mask: fx.Node, call: Call) -> bool:
    """A scale, of one number or of one a row, is no mask; a condition may broadcast, and a mask of blocks."""
    product, value, factor = example(call.node), example(weight), example(mask)
    if product is None or value is None or factor is None:
        return False
    if not value.is_floating_point() or value.shape != product.shape:
        return False
    return factor.shape == product.shape or call.op != "mul" or product.ndim > 2

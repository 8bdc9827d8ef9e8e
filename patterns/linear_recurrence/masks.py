"""Matrices of steps by steps that are one number but where a constant mask keeps them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, fx

from structfly.rewriter.calls import both_ways, read
from structfly.rewriter.constants import Constant, read_constant
from structfly.rewriter.region import Region, example


class Mask(NamedTuple):
    """Where a tensor is kept.

    Attributes:
        source: what the mask is made of, or None for the triangle that ``torch.tril`` keeps.
        keeps: the mask itself, of the value of ``source``, or why that is none.
        diagonal: of ``torch.tril``.
    """

    source: fx.Node | None
    keeps: Callable[[Tensor], Tensor | str] = Tensor.bool
    diagonal: int = 0


class Masked(NamedTuple):
    """``node`` = ``value`` where ``mask`` keeps it, a number elsewhere."""

    node: fx.Node
    value: fx.Node
    mask: Mask


def masked(node: object, fill: float, region: Region, *, products: bool = True) -> Iterator[Masked]:
    """How a node can be read as what is ``fill``, 0 or -inf, where a mask does not keep it.

    Args:
        node: the node.
        fill: the number.
        region: where it is.
        products: whether a product with a constant is one, though it is nan where that is 0 and the value is inf.
    """
    call = read(node)
    if call is None:
        return
    if call.op == "masked_fill" and _is_filled(call["value"], fill):
        yield Masked(call.node, call["input"], Mask(call["mask"], torch.logical_not))
    elif call.op == "where":
        if _is_filled(call["other"], fill):
            yield Masked(call.node, call["input"], Mask(call["condition"]))
        elif _is_filled(call["input"], fill):
            yield Masked(call.node, call["other"], Mask(call["condition"], torch.logical_not))
    elif call.op == "tril" and fill == 0 and isinstance(call.get("diagonal", 0), int):
        yield Masked(call.node, call["input"], Mask(None, diagonal=call.get("diagonal", 0)))
    elif (call.op == "mul" and fill == 0 and products) or (call.op == "add" and fill and call.get("alpha", 1) == 1):
        keeps = _ones if call.op == "mul" else _zeros
        for value, mask in both_ways(call):
            if isinstance(read_constant(mask, region), Constant):
                yield Masked(call.node, value, Mask(mask, keeps))


def why_no_triangle(mask: Mask, rank: int, dims: tuple[int, int], steps: int, diagonal: int, region: Region) -> str:
    """Why a mask does not keep just the lower triangle of a tensor of such rank, or "".

    Args:
        mask: the mask.
        rank: dimensions of what it is of.
        dims: the rows' and the columns'.
        steps: of both.
        diagonal: the highest that is kept.
        region: where it is.
    """
    if mask.source is None:
        if dims != (rank - 2, rank - 1):
            return "the triangle is of other dimensions than the steps"
        return "" if mask.diagonal == diagonal else f"the triangle ends at diagonal {mask.diagonal}, not at {diagonal}"
    constant = read_constant(mask.source, region)
    if not isinstance(constant, Constant):
        return f"the mask {mask.source.name} is no constant: {constant}"
    if constant.places:
        return f"the mask {mask.source.name} is made of a module's state, which may change; make it where it is used"
    value = example(mask.source)
    assert value is not None
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(value.device.type, enabled=False):
        kept = mask.keeps(constant.value(()))
        if isinstance(kept, str):
            return f"the mask {mask.source.name} {kept}"
        kept = kept[(None,) * (rank - kept.ndim)]
        sizes = [steps if dim in dims else 1 for dim in range(rank)]
        if list(kept.shape) != sizes:
            return f"the mask {mask.source.name} is {tuple(kept.shape)}; allowed: {tuple(sizes)}, of steps alone"
        matrix = kept.movedim(dims, (-2, -1)).reshape(steps, steps)
        if not torch.equal(matrix, torch.ones_like(matrix).tril(diagonal)):
            return f"the mask {mask.source.name} keeps something else than each step with those before it"
    return ""


def _is_filled(value: object, fill: float) -> bool:
    """Whether a value is the number, or a tensor of it."""
    call = read(value)
    if call is not None and call.op in ("full", "full_like", "tensor"):
        value = call["data" if call.op == "tensor" else "fill_value"]
    elif call is not None and call.op in ("zeros", "zeros_like"):
        value = 0
    return isinstance(value, (int, float)) and value == fill


def _ones(value: Tensor) -> Tensor | str:
    return value != 0 if bool(((value == 0) | (value == 1)).all()) else "has other values than 0 and 1"


def _zeros(value: Tensor) -> Tensor | str:
    known = bool(((value == 0) | (value == -math.inf)).all())
    return value == 0 if known else "has other values than 0 and -inf"

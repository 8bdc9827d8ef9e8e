"""What views do to the axes of a tensor, by exact reasoning on sizes, symbolic ones included.

A tensor's dimension is a product of axes in row-major order; a view splits, merges and reorders axes and moves no
number within one.  A reshape that cannot be written so (of 4 x 6 to 3 x 8, say) fails.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import sympy
import torch
from torch import fx

from structfly.compat import expression
from structfly.rewriter.calls import Call, flat, read
from structfly.rewriter.region import example
from structfly.rewriter.views import RESHAPES


@dataclass(frozen=True, eq=False)
class Axis:
    """One axis; equal to itself alone."""

    size: sympy.Expr


Axes: TypeAlias = tuple[Axis, ...]
Dims: TypeAlias = tuple[Axes, ...]
"""One entry a dimension; a dimension of size 1 has no axes."""


class AxisError(Exception):
    """Why a node is no view that keeps axes whole."""


@dataclass
class AxisSplits:
    """Axes that were found to consist of two others.  What was noted of an axis before it was split holds for its parts
    in order: :meth:`refined`."""

    parts: dict[Axis, tuple[Axis, Axis]] = field(default_factory=dict)

    def refined(self, axes: Iterable[Axis]) -> Axes:
        """The same, with the parts in the place of axes that were split."""
        made: list[Axis] = []
        for axis in axes:
            made.extend(self.refined(self.parts[axis]) if axis in self.parts else (axis,))
        return tuple(made)

    def reshaped(self, axes: Axes, sizes: Sequence[sympy.Expr]) -> Dims:
        """``axes``, in row-major order, as dimensions of these sizes.

        Raises:
            AxisError: a dimension would hold part of an axis that is not a leading one.
        """
        waiting = list(reversed(self.refined(axes)))
        dims: list[Axes] = []
        for size in sizes:
            taken: list[Axis] = []
            left = size
            while left != 1:
                if not waiting:
                    raise AxisError("sizes that do not multiply to those before")
                axis = waiting.pop()
                rest, over = quotient(left, axis.size), quotient(axis.size, left)
                if rest is not None:
                    left = rest
                elif over is not None:
                    first, second = self.parts[axis] = Axis(left), Axis(over)
                    waiting.append(second)
                    axis, left = first, sympy.Integer(1)
                else:
                    raise AxisError(f"a dimension of {size} is part of one axis and part of the next")
                taken.append(axis)
            dims.append(tuple(taken))
        if waiting:
            raise AxisError("sizes that do not multiply to those before")
        return tuple(dims)


def quotient(size: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr | None:
    """``size / divisor`` if that is a whole number whatever the symbols are."""
    exact = sympy.cancel(size / divisor)
    whole = exact.is_polynomial() and all(number.is_integer for number in exact.as_coefficients_dict().values())
    return exact if whole else None


def sizes_of(value: torch.Tensor) -> tuple[sympy.Expr, ...]:
    """A shape as expressions."""
    return tuple(expression(size) for size in value.shape)


def root_axes(value: torch.Tensor) -> Dims:
    """One axis for each dimension that is more than 1."""
    return tuple(() if size == 1 else (Axis(size),) for size in sizes_of(value))


def product_of(axes: Iterable[Axis]) -> sympy.Expr:
    """How many numbers stand along these axes together."""
    total = sympy.Integer(1)
    for axis in axes:
        total *= axis.size
    return total


def viewed(node: fx.Node) -> Call | None:
    """The call of a node that reorders axes and does nothing else."""
    call = read(node)
    if call is None or example(node) is None or example(call.get("input")) is None:
        return None
    if call.op in ("view", "reshape") and any(isinstance(size, torch.dtype) for size in flat(call["shape"])):
        return None
    swaps = call.op == "getattr" and call["name"] in ("T", "mT")
    moves = (*RESHAPES, "transpose", "permute", "movedim", "t", "contiguous", "clone")
    return call if swaps or call.op in moves or _unsqueezes(call) else None


def _unsqueezes(call: Call) -> bool:
    """Whether an index does nothing but add dimensions, as in ``x[:, None]``."""
    index = call["index"] if call.op == "getitem" else None
    entries = index if isinstance(index, tuple) else (index,)
    return call.op == "getitem" and all(each is None or each is Ellipsis or each == slice(None) for each in entries)


def after(call: Call, dims: Dims, splits: AxisSplits) -> Dims:
    """The dimensions after a view of a tensor that has ``dims``.

    Raises:
        AxisError: the view takes axes apart.
    """
    if call.op in ("contiguous", "clone"):
        return dims
    if call.op in RESHAPES or call.op == "getitem":
        result = example(call.node)
        assert result is not None
        return splits.reshaped(tuple(axis for dim in dims for axis in dim), sizes_of(result))
    return tuple(dims[place] for place in _order(call, len(dims)))


def _order(call: Call, ndim: int) -> list[int]:
    order = list(range(ndim))
    if call.op == "permute":
        return [dim % ndim for dim in flat(call["dims"])]
    if call.op == "movedim":
        sources, places = ([dim % ndim for dim in flat(call[name])] for name in ("source", "destination"))
        rest = iter(dim for dim in order if dim not in sources)
        return [sources[places.index(place)] if place in places else next(rest) for place in order]
    if call.op == "transpose":
        first, second = call["dim0"] % ndim, call["dim1"] % ndim
    else:  # t, T and mT
        if ndim < 2 or (ndim > 2 and not (call.op == "getattr" and call["name"] == "mT")):
            raise AxisError(f"{call.op} of {ndim} dimensions")
        first, second = ndim - 2, ndim - 1
    order[first], order[second] = second, first
    return order

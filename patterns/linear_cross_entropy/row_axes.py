"""The rows of a head along axes: which dimensions of a value they are, and which of them make a group.

The rows, in their row-major order, are all combinations of places along some axes: (sequences, tokens), say.  A reshape
or a pick of every second half cuts an axis in two, (sequences) in (better or worse, pairs).  An axis that is summed
before something that is not linear, or along which places are told apart, is inside a group.  A group is then all
combinations of places along the inner axes, and the op takes the rows in an order in which these come last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from structfly.compat import equal_sizes, expression, size_hint

Size = int | torch.SymInt


@dataclass(frozen=True)
class OfConsumer:
    """The size of dimension ``dim`` of the rows as the consumer at ``node`` has them."""

    node: fx.Node
    dim: int


@dataclass(frozen=True)
class OfReshape:
    """The size of dimension ``dim`` of the reshape ``node`` of a value with the axes ``source``."""

    node: fx.Node
    source: Dims
    dim: int


@dataclass(frozen=True)
class Quotient:
    """The size of ``axis`` over ``parts``."""

    axis: Axis
    parts: int


@dataclass(eq=False)
class Axis:
    """An axis of the rows; equal to nothing but itself.

    Attributes:
        size: how many places it has.
        origin: where a rewrite finds that; None for a constant.
        cut: the axes that it has been cut into, outermost first.
        inner: it lies inside the groups.
    """

    size: Size
    origin: OfConsumer | OfReshape | Quotient | None
    cut: tuple[Axis, ...] = ()
    inner: bool = False

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """What has to exist where its size is written: what the reshapes take of which that is found."""
        if isinstance(self.size, int) or self.origin is None or isinstance(self.origin, OfConsumer):
            return ()
        if isinstance(self.origin, Quotient):
            return self.origin.axis.inputs
        before = (node for axes in self.origin.source for axis in axes for node in axis.inputs)
        return (*self.origin.node.all_input_nodes[1:], *before)


# For each dimension of a value its axes, outermost first; none where the size is 1.
Dims = tuple[tuple[Axis, ...], ...]


def leaves(axes: Iterable[Axis]) -> tuple[Axis, ...]:
    """The axes, those that have been cut as what they were cut into."""
    return tuple(leaf for axis in axes for leaf in (leaves(axis.cut) if axis.cut else (axis,)))


def leaves_of(dims: Dims) -> tuple[Axis, ...]:
    """All axes of a value."""
    return leaves(axis for axes in dims for axis in axes)


@dataclass(frozen=True)
class RowAxes:
    """All axes of the rows, in their row-major order."""

    axes: tuple[Axis, ...]

    @property
    def given(self) -> tuple[Axis, ...]:
        """In the order of the user's rows."""
        return leaves(self.axes)

    @property
    def outer(self) -> tuple[Axis, ...]:
        """Of which the groups are all combinations."""
        return tuple(axis for axis in self.given if not axis.inner)

    @property
    def inner(self) -> tuple[Axis, ...]:
        """Of which a group's rows are all combinations."""
        return tuple(axis for axis in self.given if axis.inner)

    @property
    def moves(self) -> bool:
        """Whether groups do not follow one another in the user's order."""
        return (*self.outer, *self.inner) != self.given

    @property
    def group_rows(self) -> int:
        """How many rows a group has, at the example's sizes."""
        return math.prod(size_hint(axis.size) or 1 for axis in self.inner)

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """What has to exist where sizes are written."""
        return tuple(dict.fromkeys(node for axis in self.given for node in axis.inputs))


def reshaped(source: Dims, sizes: Sequence[Size], origin: Callable[[int], OfConsumer | OfReshape]) -> Dims | None:
    """The axes of what a value with the axes ``source`` becomes when it is reshaped to ``sizes``, or None where that
    is not known.

    An axis is cut where it has to be, unless it is inside the groups already; ``origin`` says where the size of each
    of the dimensions is found.
    """
    axes = list(leaves_of(source))
    places = [place for place, size in enumerate(sizes) if not _same(size, 1)]
    made: dict[int, tuple[Axis, ...]] = {}
    for end in (0, -1):
        while axes and places and _same(axes[end].size, sizes[places[end]]):
            made[places.pop(end)] = (axes.pop(end),)
    if len(places) == 1 and axes:
        made[places[0]] = tuple(axes)
    elif len(axes) == 1 and places and not axes[0].inner:
        axes[0].cut = tuple(Axis(sizes[place], origin(place)) for place in places)
        made.update({place: (axis,) for place, axis in zip(places, axes[0].cut, strict=True)})
    elif axes or places:
        return None
    return tuple(made.get(place, ()) for place in range(len(sizes)))


@dataclass(frozen=True)
class Part:
    """Place ``place`` along the inner axis ``axis``, with the axes that are left."""

    axis: Axis
    place: int
    rest: tuple[Axis, ...]


def part_of(axes: Sequence[Axis], size: Size, start: Size, count: Size, step: int) -> Part | None:
    """``count`` places of a dimension of ``size``, each ``step``-th from ``start`` on, as one of equal parts, which
    follow one another or, where ``step`` is not 1, alternate; None where they are not known to be.
    """
    length, whole, first = size_hint(count), size_hint(size), size_hint(start)
    if not length or whole is None or first is None:
        return None
    single = isinstance(start, int) and count == 1 and step in (1, size)  # one place of an axis, however long
    parts, place = (size, first) if single else (whole // length, first // length if step == 1 else first)
    if not single:
        if isinstance(count, int) and not isinstance(size, int):
            return None  # how many parts there are depends on the size
        if not equal_sizes(count * parts, size) or not equal_sizes(start, count * place if step == 1 else place):
            return None
        if step not in (1, parts):
            return None
    found = leaves(axes)
    if len(found) == 1 and not (single or found[0].inner):
        (axis,) = found
        inside = Axis(parts, None), Axis(count, Quotient(axis, whole // length))
        axis.cut = found = inside if step == 1 else inside[::-1]
    part, rest = (found[0], found[1:]) if step == 1 else (found[-1], found[:-1])
    if not _same(part.size, parts):
        return None
    part.inner = True
    return Part(part, place, rest)


def _same(one: Size, other: Size) -> bool:
    return bool(sympy.expand(expression(one) - expression(other)) == 0)

"""The linear that makes all gates and the input of a recurrence, side by side and nothing beside them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from structfly.patterns.linear_recurrence.joint import Whole, other_readers, views_above, wholes_of
from structfly.patterns.projected_recurrence.recurrences import RecurrenceCall
from structfly.rewriter.calls import read
from structfly.rewriter.linear import LinearLike, read_linear
from structfly.rewriter.region import example
from structfly.rewriter.views import VIEWS, RowView, read_view, view_input
from structfly.rewriter.writes import written


@dataclass(frozen=True)
class Projection:
    """A linear and what leads from it to a recurrence.

    Attributes:
        linear: the linear.
        views: that lead to a tensor of three dimensions, and move its rows alone.
        dims: which of its dimensions are batch, steps and channels.
        order: what lies in the channels, by the letters of the op's ``order``.
        nodes: the linear, and what is between it and the recurrence.
    """

    linear: LinearLike
    views: tuple[RowView, ...]
    dims: tuple[int, ...]
    order: str
    nodes: tuple[fx.Node, ...]


def read_projection(call: RecurrenceCall) -> Projection | str | None:
    """The linear, or why there is not one, or None where nothing is made by linears."""
    for whole in _wholes(call):
        found = _leading(whole)
        if found is not None:
            return found
    sources = call.sequences.values() if call.joint is None else call.joint[:1]
    if all(read_linear(list(views_above(source))[-1]) is not None for source in sources):
        return "gates and input are not the slices, all that there are and of one size, of what one linear makes"
    return None


def readers_beside(call: RecurrenceCall, projection: Projection) -> list[str]:
    """The names of what reads the linear's value besides the recurrence."""
    goals = set(call.sequences.values()) if call.joint is None else {call.joint[0]}
    places = dict.fromkeys((projection.linear.node, *goals))
    found = (reader for place in places for reader in other_readers(place, goals, {call.node}))
    return list(dict.fromkeys(reader.name for reader in found))


def _wholes(call: RecurrenceCall) -> Iterator[Whole]:
    if call.joint is None:
        yield from wholes_of(call.sequences)
    else:
        tensor, order = call.joint
        yield Whole(tensor, order, (0, 1, 2), ())


def _leading(whole: Whole) -> Projection | None:
    """The linear that a tensor is a view of, of whose channels that makes none its rows."""
    node, path = whole.tensor, list[fx.Node]()
    linear = read_linear(node)
    while linear is None:
        call = None if written(node) else read(node)
        if call is None or call.op not in VIEWS:
            return None
        path.append(node)
        node = view_input(node)
        linear = read_linear(node)
    made, weight = example(node), example(linear.weight)
    if made is None or weight is None or weight.ndim != 2:
        return None
    channels, views = made.ndim - 1, list[RowView]()
    for each in reversed(path):
        view = read_view(each, channels)
        if not isinstance(view, RowView) or view.num_classes is not None:
            return None
        channels = view.class_dim
        views.append(view)
    if channels != whole.dims[2]:
        return None
    return Projection(linear, tuple(views), whole.dims, whole.order, (node, *path, *whole.views))

"""Picks of rows by constant places: slices, single places, and elements of splits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from structfly.compat import expression, size_hint
from structfly.patterns.linear_cross_entropy.row_axes import Size
from structfly.rewriter.calls import Call, read
from structfly.rewriter.region import example
from structfly.rewriter.views import SPLITS


@dataclass(frozen=True)
class Interval:
    """``count`` of the ``size`` places of dimension ``dim``, each ``step``-th from ``start`` on."""

    dim: int
    size: Size
    start: Size
    count: Size
    step: int = 1


@dataclass(frozen=True)
class Picks:
    """What a pick takes.

    Attributes:
        source: the value it picks from.
        intervals: of the dimensions that it does not take whole.
        result: for each dimension of the result the one of the source, None for one that is new.
    """

    source: fx.Node
    intervals: tuple[Interval, ...]
    result: tuple[int | None, ...]


def is_split(node: fx.Node) -> bool:
    """Whether a node is a tuple of parts, whose elements are picks."""
    call = read(node)
    return call is not None and call.op in SPLITS


def read_picks(call: Call) -> Picks | None:
    """What the call, one of :data:`~structfly.rewriter.views.PICKS`, takes, or None where an index is no constant."""
    source = call["input"]
    if call.op == "getitem" and is_split(source):
        return _element(call)
    value, taken = example(source), example(call.node)
    if value is None or taken is None:
        return None
    if call.op == "getitem":
        index = call["index"]
        return _indexed(source, value, index if isinstance(index, tuple) else (index,), taken)
    dim = call.get("dim")
    if not isinstance(dim, int):
        return None
    dim %= value.ndim
    if call.op == "select":
        return _indexed(source, value, (*[slice(None)] * dim, call["index"]), taken)
    start, length = _size(call["start"]), _size(call["length"])
    if start is None or length is None:
        return None
    return _picks(source, [Interval(dim, value.shape[dim], start, length)], range(value.ndim))


def _picks(source: fx.Node, intervals: Sequence[Interval], result: Iterable[int | None]) -> Picks:
    cut = tuple(each for each in intervals if expression(each.count) != expression(each.size))
    return Picks(source, cut, tuple(result))


def _element(call: Call) -> Picks | None:
    split, index, taken = read(call["input"]), call["index"], example(call.node)
    if split is None or taken is None or not isinstance(index, int):
        return None
    source, parts = split["input"], split.node.meta["example_value"]
    value, dim = example(source), split.get("dim", 0)
    if value is None or not isinstance(dim, int):
        return None
    dim, index = dim % value.ndim, index % len(parts)
    if split.op == "unbind":
        return _indexed(source, value, (*[slice(None)] * dim, index), taken)
    sizes = [part.shape[dim] for part in parts]
    return _picks(source, [Interval(dim, value.shape[dim], sum(sizes[:index]), sizes[index])], range(value.ndim))


def _indexed(source: fx.Node, value: torch.Tensor, entries: Sequence[Any], taken: torch.Tensor) -> Picks | None:
    used = sum(entry is not None and entry is not Ellipsis for entry in entries)
    if Ellipsis in entries:
        at = list(entries).index(Ellipsis)
        entries = [*entries[:at], *[slice(None)] * (value.ndim - used), *entries[at + 1 :]]
    intervals: list[Interval] = []
    result: list[int | None] = []
    dim = 0
    for entry in entries:
        if entry is None:
            result.append(None)
            continue
        size = value.shape[dim]
        if isinstance(entry, slice):
            start, step = _size(entry.start or 0), entry.step or 1
            count = taken.shape[len(result)]
            if start is None or not isinstance(step, int):
                return None
            if (size_hint(start) or 0) < 0:
                start = max(size + start, 0)
            intervals.append(Interval(dim, size, start, count, step))
            result.append(dim)
        elif isinstance(entry, int) and not isinstance(entry, bool):
            intervals.append(Interval(dim, size, entry if entry >= 0 else size + entry, 1))
        else:
            return None
        dim += 1
    return _picks(source, intervals, (*result, *range(dim, value.ndim)))


def _size(value: Any) -> Size | None:
    """A constant or a size of the graph."""
    if isinstance(value, fx.Node):
        value = value.meta.get("example_value")
    return value if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool) else None

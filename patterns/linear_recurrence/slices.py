"""Slices: one step of a tensor along time, in whatever way it is written."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import fx

from structfly.rewriter.calls import Call, index_entries, read
from structfly.rewriter.region import example

Span = tuple[int | None, int | None, int | None]
"""A slice of a dimension, as start, stop and step."""
WHOLE: Span = (None, None, None)


class Sequence(NamedTuple):
    """Where slices are taken: a tensor and its time.

    Attributes:
        source: the tensor.
        dim: its time.
        place: where the slice has a time, of one step; None where it has none.
        rest: how its other dimensions are cut, in order, with None for new ones of size 1.
    """

    source: fx.Node
    dim: int
    place: int | None
    rest: tuple[Span | None, ...]

    @property
    def shape(self) -> list[Any]:
        """Of a slice."""
        sizes = [size for dim, size in enumerate(self.source.meta["example_value"].shape) if dim != self.dim]
        found: list[Any] = []
        for entry in self.rest:
            size = 1 if entry is None else sizes.pop(0)
            found.append(size if entry in (None, WHOLE) else len(range(size)[slice(*entry or ())]))
        if self.place is not None:
            found.insert(self.place, 1)
        return found

    @property
    def is_whole(self) -> bool:
        """Whether a slice is all that the tensor has at a step, and no more."""
        return all(entry == WHOLE for entry in self.rest)


class Slice(NamedTuple):
    """One step of a sequence."""

    sequence: Sequence
    step: int


def read_slice(call: Call) -> Slice | None:
    """The slice that a call takes, or None if it takes none, or of two dimensions at once."""
    if call.op == "getitem":
        value = call.node.args[0].meta.get("example_value") if isinstance(call.node.args[0], fx.Node) else None
        return _element(call) if isinstance(value, (tuple, list)) else _indexed(call)
    if call.op == "select":
        return _at(call["input"], call["dim"], call["index"])
    if call.op == "narrow" and call["length"] == 1:
        return _at(call["input"], call["dim"], call["start"], kept=True)
    return None


def _element(call: Call) -> Slice | None:
    """An element of ``unbind``, or of a split into single steps."""
    split, index = read(call["input"]), call["index"]
    if split is None or not isinstance(index, int):
        return None
    if split.op == "unbind":
        return _at(split["input"], split.get("dim", 0), index)
    value = example(call.node)
    dim = split.get("dim", 0)
    if split.op not in ("split", "chunk", "tensor_split") or value is None or not isinstance(dim, int):
        return None
    parts = call.node.args[0].meta["example_value"]  # type: ignore[union-attr]
    return _at(split["input"], dim, index, kept=True) if all(part.shape[dim] == 1 for part in parts) else None


def _indexed(call: Call) -> Slice | None:
    tensor = example(call["input"])
    entries = [] if tensor is None else index_entries(call["index"], tensor.ndim)
    if tensor is None or not all(type(entry) in (int, slice) or entry is None for entry in entries):
        return None
    dim = 0
    dropped: list[tuple[int, int, int]] = []
    kept: list[tuple[int, int, int]] = []
    rest: list[Span | None] = []
    for place, entry in enumerate(entries):
        bounds = (entry.start, entry.stop, entry.step) if isinstance(entry, slice) else WHOLE
        if not all(bound is None or isinstance(bound, int) for bound in bounds):
            return None
        rest.append(
            None if entry is None else WHOLE if bounds[0] in (None, 0) and bounds[1:] in _TO_THE_END else bounds
        )
        if isinstance(entry, int):
            dropped.append((place, dim, entry))
        elif isinstance(entry, slice) and _is_single(entry, tensor.shape[dim]):
            kept.append((place, dim, entry.start))
        dim += entry is not None
    found = dropped or kept  # beside an integer, a slice of one is a part of the step
    if len(found) != 1:
        return None
    ((place, dim, index),) = found
    del rest[place]
    return _at(call["input"], dim, index, None if dropped else place, tuple(rest))


_TO_THE_END = ((None, None), (None, 1))


def _is_single(entry: slice, size: object) -> bool:
    start, stop = entry.start, entry.stop
    if not isinstance(start, int) or entry.step not in (None, 1):
        return False
    if start == -1:
        return stop is None
    return stop == start + 1 or (stop is None and isinstance(size, int) and start == size - 1)


def _at(
    source: object,
    dim: object,
    index: object,
    place: int | None = None,
    rest: tuple[Span | None, ...] | None = None,
    *,
    kept: bool = False,
) -> Slice | None:
    tensor = example(source)
    if tensor is None or not isinstance(source, fx.Node) or not isinstance(dim, int) or not isinstance(index, int):
        return None
    dim %= tensor.ndim
    size = tensor.shape[dim]
    if not isinstance(size, int) or size < 2:
        return None
    rest = (WHOLE,) * (tensor.ndim - 1) if rest is None else rest
    return Slice(Sequence(source, dim, dim if kept else place, rest), index % size)

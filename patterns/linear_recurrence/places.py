"""Which places of a tensor a call takes, or adds, along one dimension."""

from __future__ import annotations

from typing import NamedTuple

from torch import fx

from structfly.patterns.linear_recurrence.spans import OTHER, ZERO, Pieces, filling
from structfly.rewriter.calls import Call, index_entries, read
from structfly.rewriter.region import example

_ZEROS = ("zeros", "zeros_like", "new_zeros")
_ONES = ("ones", "ones_like", "new_ones")


class Taken(NamedTuple):
    """``places`` places from ``start`` on, ``step`` apart, of dimension ``dim``."""

    dim: int
    start: int
    places: int
    step: int


class Padding(NamedTuple):
    """Places that are put in front of a tensor along ``dim``, or behind it, and what they hold."""

    dim: int
    in_front: bool
    pieces: Pieces


def taken(call: Call) -> Taken | None:
    """What a slice takes, if of one dimension alone it takes a part."""
    tensor = example(call["input"])
    if tensor is None:
        return None
    if call.op == "getitem":
        entries = index_entries(call["index"], tensor.ndim)
        cut = [dim for dim, entry in enumerate(entries) if entry != slice(None)]
        if len(cut) != 1 or not all(isinstance(entry, slice) for entry in entries):
            return None
        dim, part = cut[0], entries[cut[0]]
    elif call.op == "narrow":
        dim, start, count = call["dim"], call["start"], call["length"]
        if not isinstance(start, int) or not isinstance(count, int) or start < 0:
            return None
        part = slice(start, start + count)
    else:
        dim = call.get("dim", 0)
        part = slice(call.get("start"), call.get("end"), call.get("step"))
    dim %= tensor.ndim
    bounds = (part.start, part.stop, part.step)
    if not isinstance(tensor.shape[dim], int) or not all(each is None or isinstance(each, int) for each in bounds):
        return None
    places = range(tensor.shape[dim])[part]
    return Taken(dim, places.start, len(places), places.step) if places.step > 0 and len(places) else None


def padding(call: Call) -> Padding | None:
    """What is added, if it is zeros or ones on one side of one dimension."""
    tensor = example(call["input"])
    amounts = list(call["pad"])
    padded = [place for place, amount in enumerate(amounts) if amount != 0]
    if tensor is None or call.get("mode", "constant") != "constant" or len(padded) != 1:
        return None
    (place,) = padded
    value = call.get("value")
    if not isinstance(amounts[place], int) or amounts[place] < 0 or value not in (None, 0, 1):
        return None
    fill = OTHER if value == 1 else ZERO
    return Padding(tensor.ndim - 1 - place // 2, place % 2 == 0, filling(amounts[place], fill))


def filled(node: fx.Node, dim: int) -> Pieces | None:
    """The places of a tensor of zeros, or of ones; None of any other."""
    tensor = example(node)
    if tensor is None or not isinstance(tensor.shape[dim], int):
        return None
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    call = read(node)
    if call is not None and call.op in ("full", "full_like"):
        fill = {0: ZERO, 1: OTHER}.get(call["fill_value"])
    else:
        fill = ZERO if name in _ZEROS else OTHER if name in _ONES else None
    return None if fill is None else filling(tensor.shape[dim], fill)

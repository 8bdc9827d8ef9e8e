"""What the places of a tensor hold that is combined of gates and inputs of neighbouring steps.

A place holds the product of the gates of the steps first..last, or the state that these steps make of 0.  Of
neighbouring spans, one of the steps before and one of those behind,

    product(first..last)  = product(behind) product(before)
    state(first..last)    = state(behind) + product(behind) state(before)

and nothing else is known of any other.  Places are kept as pieces in which the ends of spans grow evenly, so that what
is done to them takes about as long for a million steps as for ten.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import fx

ZERO, OTHER = -1, -2
"""In the place of steps: of a place that holds 0, and of one that holds what is known to be no state."""


class Piece(NamedTuple):
    """Places of which the next one's span begins and ends so many steps later."""

    places: int
    first: int
    last: int
    first_by: int = 0
    last_by: int = 0

    def cut(self, offset: int, count: int, step: int = 1) -> Piece:
        """``count`` places from ``offset`` on, ``step`` apart."""
        first, last = self.first + offset * self.first_by, self.last + offset * self.last_by
        grows = count > 1
        return Piece(count, first, last, self.first_by * step * grows, self.last_by * step * grows)

    @property
    def single(self) -> bool:
        """Whether all spans are of one step."""
        return self.first < 0 or (self.first == self.last and self.first_by == self.last_by)


Pieces = tuple[Piece, ...]


class Spans(NamedTuple):
    """``gate`` is the tensor of the gates of steps, and ``input`` that of inputs, None for products; what is of single
    steps is a product until it is needed as a state, and then ``gate`` is the input."""

    gate: fx.Node | None
    input: fx.Node | None
    pieces: Pieces


def steps(node: fx.Node, count: int) -> Spans:
    """A tensor itself."""
    return Spans(node, None, (Piece(count, 0, 0, 1, 1).cut(0, count),))


def filling(places: int, kind: int) -> Pieces:
    """Places that hold zeros, or what is known to be no state."""
    return (Piece(places, kind, kind),)


def is_complete(spans: Spans) -> bool:
    """Whether every place holds the state of all steps up to its own."""
    count = length(spans.pieces)
    return spans.input is not None and spans.pieces == (Piece(count, 0, 0, 0, 1).cut(0, count),)


def reach(spans: Spans) -> int:
    """Steps of the longest span, if spans end at their own places."""
    place = longest = 0
    for piece in spans.pieces:
        if piece.last != place or (piece.places > 1 and piece.last_by != 1):
            return 0
        ends = (piece, piece.cut(piece.places - 1, 1))
        longest = max(longest, *(each.last - each.first + 1 for each in ends))
        place += piece.places
    return longest


# ----------------------------------------------------------------------------------------------------- arrangements


def joined(pieces: Iterable[Piece]) -> Pieces:
    """Places behind one another, in as few pieces as they need."""
    made: list[Piece] = []
    for piece in pieces:
        if piece.places:
            together = _together(made[-1], piece) if made else None
            if together is None:
                made.append(piece)
            else:
                made[-1] = together
    return tuple(made)


def _together(one: Piece, other: Piece) -> Piece | None:
    if (one.first < 0 or other.first < 0) and one.first != other.first:
        return None
    ends = []
    for start, by, then, then_by in (
        (one.first, one.first_by, other.first, other.first_by),
        (one.last, one.last_by, other.last, other.last_by),
    ):
        each = by if one.places > 1 else then - start
        if then != start + one.places * each or (other.places > 1 and then_by != each):
            return None
        ends.append(each)
    return Piece(one.places + other.places, one.first, one.last, *ends)


def part(pieces: Pieces, start: int, count: int, step: int = 1) -> Pieces:
    """``count`` places from ``start`` on, ``step`` apart."""
    made, place, stop = [], 0, start + (count - 1) * step + 1
    for piece in pieces:
        offset = start - place if place < start else (start - place) % step
        taken = -(-(min(place + piece.places, stop) - place - offset) // step)
        if taken > 0:
            made.append(piece.cut(offset, taken, step))
        place += piece.places
    return joined(made)


def interleaved(one: Pieces, other: Pieces) -> Pieces | None:
    """A place of one after a place of the other, None where spans then do not grow evenly."""
    made: list[Piece] = []
    for first, second in aligned(one, other):
        pairs = [joined((first.cut(at, 1), second.cut(at, 1))) for at in range(min(first.places, 2))]
        whole = joined(piece for pair in pairs for piece in pair)
        if len(whole) == 1 and first.places > 2:
            whole = (whole[0]._replace(places=2 * first.places),)
        elif first.places > 2:
            return None
        made.extend(whole)
    return joined(made)


def aligned(*tensors: Pieces) -> Iterator[tuple[Piece, ...]]:
    """Pieces of the same places, as far as all have some."""
    rests = [list(reversed(each)) for each in tensors]
    while rests and all(rests):
        tops = [rest.pop() for rest in rests]
        count = min(top.places for top in tops)
        for rest, top in zip(rests, tops, strict=True):
            if top.places > count:
                rest.append(top.cut(count, top.places - count))
        yield tuple(top.cut(0, count) for top in tops)


def length(pieces: Pieces) -> int:
    return sum(piece.places for piece in pieces)


# ------------------------------------------------------------------------------------------------------- operations


def product(one: Spans, other: Spans) -> Spans | None:
    """The product of two tensors as products of gates."""
    if one.input is not None or other.input is not None or one.gate is not other.gate:
        return None
    made = []
    for x, y in aligned(one.pieces, other.pieces):
        if x.first < 0 or y.first < 0:
            made.append(Piece(x.places, OTHER, OTHER))
        elif _follows(x, y):
            made.append(Piece(x.places, x.first, y.last, x.first_by, y.last_by))
        elif _follows(y, x):
            made.append(Piece(x.places, y.first, x.last, y.first_by, x.last_by))
        else:
            return None
    return Spans(one.gate, None, joined(made))


def state(behind: Spans, gate: Spans, before: Spans) -> Spans | None:
    """``behind + gate * before`` as states."""
    kinds = as_states(behind), as_states(before)
    if gate.input is not None or kinds[0] is None or kinds[1] is None or kinds[0].input is not kinds[1].input:
        return None
    if any(each.gate not in (None, gate.gate) for each in kinds if each is not None):
        return None
    made = []
    for x, f, y in aligned(behind.pieces, gate.pieces, before.pieces):
        if x.first >= 0 and y.first == ZERO:
            made.append(x)
        elif min(x.first, f.first, y.first) >= 0 and _follows(y, x) and x == f:
            made.append(Piece(x.places, y.first, x.last, y.first_by, x.last_by))
        else:
            return None
    return Spans(gate.gate, kinds[0].input, joined(made))


def as_states(spans: Spans) -> Spans | None:
    """Single steps as states, whose gate is not known yet."""
    if spans.input is not None:
        return spans
    return Spans(None, spans.gate, spans.pieces) if all(piece.single for piece in spans.pieces) else None


def kind(parts: Sequence[Spans]) -> tuple[fx.Node | None, fx.Node | None] | None:
    """Gate and input of tensors that are put together, None of those that cannot be."""
    kinds = {(each.gate, each.input) for each in parts}
    if len(kinds) == 1:
        return kinds.pop()
    states = [as_states(each) for each in parts]
    gates = {each.gate for each in states if each is not None} - {None}
    inputs = {each.input for each in states if each is not None}
    if None in states or len(inputs) != 1 or len(gates) != 1:
        return None
    return gates.pop(), inputs.pop()


def written(old: Spans, start: int, new: Spans) -> Spans | None:
    """``old`` with ``new`` in the places from ``start`` on."""
    found = kind((old, new))
    if found is None:
        return None
    count, stop = length(old.pieces), start + length(new.pieces)
    pieces = (*part(old.pieces, 0, start), *new.pieces, *part(old.pieces, stop, count - stop))
    return Spans(*found, joined(pieces))


def _follows(before: Piece, behind: Piece) -> bool:
    return behind.first == before.last + 1 and behind.first_by == before.last_by

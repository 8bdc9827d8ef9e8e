"""Boxes of b that reach over parts of it which lie side by side.

Where a part's side is no multiple of a box they leave less of it empty: two parts of 96 columns are three boxes of 64,
and one after another they would be four.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Half(NamedTuple):
    """Half of a box: the column of all of b, or of z, where it begins; which block or part of the result it is
    multiplied for, and the column of that."""

    at: int
    member: int
    n0: int


class Box(NamedTuple):
    """Of one product of a tile: whose it is, where its box begins, and the result's places of both halves."""

    whose: int
    at: int
    member_0: int
    n0_0: int
    member_1: int
    n0_1: int


def boxes(whose: int, halves: Sequence[Half], width: int, nowhere: int) -> Iterator[Box]:
    """Boxes of two halves that follow one another, and of single ones.

    Args:
        whose: as :class:`Box` has it.
        halves: in any order.
        width: columns of each.
        nowhere: a column beyond the result's, where what the other half of a single one gives is not written.
    """
    left = sorted(halves)
    while left:
        one = left.pop(0)
        follows = bool(left) and left[0].at == one.at + width
        other = left.pop(0) if follows else Half(one.at + width, one.member, nowhere)
        yield Box(whose, one.at, *one[1:], *other[1:])

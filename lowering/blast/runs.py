"""Chunks of a backward that kept nothing: how many tokens each has, and where what is held of it lies.

Backward writes dx (N, width) from its beginning on, a chunk after another, and holds H numbers of each of a chunk's
tokens.  What is not written yet has room for them, at its end:

    dx of the c tokens from ``start`` on ends at    (start + c) width,
    what is held of them begins at                  N width - c H.

So c may be (N - start) width / (width + H): chunks are large at first, and shrink.  Each size is made ready anew, so
there are few: powers of two, each as often as it has room.  Once chunks in memory of their own may be as large, the
others are such.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

_LARGEST = 2048  # tokens of a chunk, of which all products are in several rounds of tiles
_SMALLEST = 128  # the longest side of a tile that chunks fill


class Run(NamedTuple):
    """Equal chunks, one after another.

    Attributes:
        start, stop: of their tokens.
        width: tokens of each, of which the last may have fewer.
        within: whether what is held of them lies in what is not written yet of dx.
    """

    start: int
    stop: int
    width: int
    within: bool


def runs_within(tokens: int, width: int, held: int, alone: Callable[[int], int]) -> Iterator[Run]:
    """The runs of so many tokens.

    Args:
        width: numbers of a token in dx.
        held: of each of a chunk's tokens.
        alone: how many tokens a chunk has whose held numbers have memory of their own, where so many are left.
    """
    start, size = 0, _LARGEST
    while size >= _SMALLEST and alone(tokens - start) < min(size, tokens - start):
        last = tokens - -(-size * (width + held) // width)  # where a chunk may start at the latest
        if last >= start:
            stop = start + (last - start) // size * size + size
            yield Run(start, stop, size, within=True)
            start = stop
        size //= 2
    if start < tokens:
        yield Run(start, tokens, alone(tokens - start), within=False)

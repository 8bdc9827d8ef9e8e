"""Where the tiles of the gradients of blocks stand, and of those of a product of low rank beside them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from structfly.lowering.gemm import Tiles

BLOCK, LEFT, RIGHT = range(3)
"""Whose gradient a product is."""


class Gradients(NamedTuple):
    """What a launch makes: c[i] = a[:, rows[i]]^T b[:, columns[i]], and with a rank a^T z and dz^T b.

    Attributes:
        rows, columns: parts of a and b.
        side_m, side_n: of those.
        rank: of the product beside the blocks, or 0.
        itemsize: bytes of a number of a and b.
    """

    rows: int
    columns: int
    side_m: int
    side_n: int
    rank: int = 0
    itemsize: int = 2


class Place(NamedTuple):
    """Of one product of a tile: whose it is, which part of b it takes and from where on, and which block or part of the
    result it is."""

    whose: int
    column: int
    n0: int
    member: int


class Places(NamedTuple):
    """The tiles of a launch.

    Attributes:
        tiles: how the products are cut.
        abreast: how many products a tile is of, which share what they take of a.
        listed: int32 (count, 2 + 4 * abreast): of each the part of a and m0, and a :class:`Place` for each product.
    """

    tiles: Tiles
    abreast: int
    listed: Tensor


def count_tiles(members: Sequence[int], made: Gradients, tiles: Tiles, abreast: int) -> int:
    """How many tiles :func:`gradient_places` lists.

    Args:
        members: how many blocks each part of ``a`` is in.
    """
    tall, across = -(-made.side_m // tiles.m), -(-made.side_n // tiles.n)
    thin = -(-made.rank // tiles.n)
    of_right = -(-made.rank // tiles.m) * -(-made.columns * across // abreast)
    return tall * sum(-(-(each * across + thin) // abreast) for each in members) + of_right


def gradient_places(rows: Tensor, columns: Tensor, made: Gradients, tiles: Tiles, abreast: int) -> Places:
    """The tiles of the gradients, on the device of ``rows``, which the host reads.

    Those with the same part of ``a`` follow one another: programs that run at one time read the same tokens, and so the
    fewest parts.

    Where a tile has fewer products than others, the rest take and make what lies outside of everything.

    Args:
        rows, columns: int32 (blocks,), the parts of a and b that each block's gradient takes.
    """
    blocks: defaultdict[int, list[Place]] = defaultdict(list)
    for member, (row, column) in enumerate(zip(rows.tolist(), columns.tolist(), strict=True)):
        blocks[row] += [Place(BLOCK, column, n0, member) for n0 in range(0, made.side_n, tiles.n)]
    nothing = Place(BLOCK, made.columns, 0, len(rows))
    listed: list[list[int]] = []

    def add(row: int, m0: int, places: Sequence[Place]) -> None:
        for first in range(0, len(places), abreast):
            group = places[first : first + abreast]
            group = [*group, *[nothing] * (abreast - len(group))]
            listed.append([row, m0, *(number for place in group for number in place)])

    for row in range(made.rows):
        places = [*blocks[row], *(Place(LEFT, 0, n0, row) for n0 in range(0, made.rank, tiles.n))]
        for m0 in range(0, made.side_m, tiles.m):
            add(row, m0, places)
    for m0 in range(0, made.rank, tiles.m):
        add(0, m0, list(_of_right(made, tiles)))
    width = 2 + len(Place._fields) * abreast
    return Places(tiles, abreast, torch.tensor(listed, dtype=torch.int32, device=rows.device).view(-1, width))


def _of_right(made: Gradients, tiles: Tiles) -> Iterator[Place]:
    for column in range(made.columns):
        for n0 in range(0, made.side_n, tiles.n):
            yield Place(RIGHT, column, n0, column)

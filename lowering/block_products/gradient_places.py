"""Where the tiles of the gradients of blocks stand, and of those of a product of low rank beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from structfly.lowering.block_products.gradient_boxes import Half, boxes
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


class Cutting(NamedTuple):
    """How a launch is cut.

    Attributes:
        tiles: of each product.
        abreast: how many products a tile is of, side by side, which share what they take of a.
        spans: whether what a product takes of b may reach over parts that lie side by side: a
            :class:`~structfly.lowering.block_products.gradient_boxes.Box`, where it is else a :class:`Place`.
    """

    tiles: Tiles
    abreast: int = 1
    spans: bool = False

    def why_not(self, made: Gradients) -> str:
        """Why gradients are not cut so, or ""."""
        half = self.tiles.n // 2
        if not self.spans:
            return ""
        if made.side_n % half:
            return f"a part's side of {made.side_n} is no multiple of {half}, half of a tile's"
        if self.tiles.with_parts(self.tiles.parts).parts < 2:
            return f"tiles of n {self.tiles.n} in {self.tiles.parts} parts are not written in halves"
        return f"numbers of {made.itemsize} bytes are not multiplied turned" if made.itemsize > 2 else ""


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
        cutting: how the products are cut.
        listed: int32 (count, 2 + width * abreast): of each the part of a and m0, and the numbers of each product.
    """

    cutting: Cutting
    listed: Tensor


def columns_of_rows(rows: Tensor, columns: Tensor, count: int) -> list[list[tuple[int, int]]]:
    """For each of so many parts of a the blocks it is in: the part of b, and which block; read on the host."""
    found: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    for member, (row, column) in enumerate(zip(rows.tolist(), columns.tolist(), strict=True)):
        found[row].append((column, member))
    return found


def count_tiles(blocks: Sequence[Sequence[tuple[int, int]]], made: Gradients, cutting: Cutting) -> int:
    """How many tiles :func:`gradient_places` lists, of what :func:`columns_of_rows` gives."""
    tall, abreast = -(-made.side_m // cutting.tiles.m), cutting.abreast
    of_rows = sum(-(-len(_of_row(row, of_row, made, cutting)) // abreast) for row, of_row in enumerate(blocks))
    return tall * of_rows + -(-made.rank // cutting.tiles.m) * -(-len(_of_right(made, cutting)) // abreast)


def gradient_places(rows: Tensor, columns: Tensor, made: Gradients, cutting: Cutting) -> Places:
    """The tiles of the gradients, on the device of ``rows``, which the host reads.

    Those with the same part of ``a`` follow one another: programs that run at one time read the same tokens, and so the
    fewest parts.

    Where a tile has fewer products than others, the rest take and make what lies outside of everything.

    Args:
        rows, columns: int32 (blocks,), the parts of a and b that each block's gradient takes.
    """
    tiles, abreast = cutting.tiles, cutting.abreast
    blocks = columns_of_rows(rows, columns, made.rows)
    nothing = _products(BLOCK, [(made.columns, len(rows))], made.side_n, cutting)[0]
    listed: list[list[int]] = []

    def add(row: int, m0: int, products: Sequence[tuple[int, ...]]) -> None:
        for first in range(0, len(products), abreast):
            group = products[first : first + abreast]
            group = [*group, *[nothing] * (abreast - len(group))]
            listed.append([row, m0, *(number for product in group for number in product)])

    for row in range(made.rows):
        products = _of_row(row, blocks[row], made, cutting)
        for m0 in range(0, made.side_m, tiles.m):
            add(row, m0, products)
    of_right = _of_right(made, cutting)
    for m0 in range(0, made.rank, tiles.m):
        add(0, m0, of_right)
    width = 2 + len(nothing) * abreast
    return Places(cutting, torch.tensor(listed, dtype=torch.int32, device=rows.device).view(-1, width))


def _of_row(row: int, blocks: Sequence[tuple[int, int]], made: Gradients, cutting: Cutting) -> list[tuple[int, ...]]:
    return _products(BLOCK, blocks, made.side_n, cutting) + _products(LEFT, [(0, row)], made.rank, cutting)


def _of_right(made: Gradients, cutting: Cutting) -> list[tuple[int, ...]]:
    return _products(RIGHT, [(column, column) for column in range(made.columns)], made.side_n, cutting)


def _products(whose: int, parts: Sequence[tuple[int, int]], side: int, cutting: Cutting) -> list[tuple[int, ...]]:
    """Of parts of b, so many columns each, and the members of the result that they are multiplied for."""
    width = cutting.tiles.n
    if not cutting.spans:
        return [Place(whose, column, n0, member) for column, member in parts for n0 in range(0, side, width)]
    halves = [Half(column * side + n0, member, n0) for column, member in parts for n0 in range(0, side, width // 2)]
    return [*boxes(whose, halves, width // 2, nowhere=side)]

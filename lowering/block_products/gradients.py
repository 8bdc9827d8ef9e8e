"""Launches of the template ``block_gradients``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from structfly.lowering.block_products.gradient_places import (
    Cutting,
    Gradients,
    Places,
    columns_of_rows,
    gradient_places,
)
from structfly.lowering.block_products.ranges import add_ranges, ranges
from structfly.lowering.block_products.ready import REMEMBERED, Ready, ready
from structfly.lowering.block_products.tiles import gradient_cut
from structfly.lowering.descriptor import Boxes, Form, form
from structfly.lowering.gemm import programs_on
from structfly.lowering.template import Parameter


class LowRankGradients(NamedTuple):
    """The gradients of a product of low rank, left right, made beside those of blocks.

    Attributes:
        dz: (tokens, rank), contiguous.
        z: (tokens, rank), or if b is turned (rank, tokens).
        left: (rows * side_m, rank), contiguous, written: a^T z.
        right: (rank, columns * side_n), contiguous, written: dz^T b.
    """

    dz: Tensor
    z: Tensor
    left: Tensor
    right: Tensor


def block_gradients(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    places: Places,
    *,
    b_turned: bool = False,
    beside: LowRankGradients | None = None,
    room: Tensor | None = None,
    spare: int | None = None,
) -> None:
    """c[i] = a[:, row]^T b[:, column] of the part of each that ``places`` has for i, summed over the tokens.

    Where that takes less time, the tokens are cut in ranges whose sums are added in float32, in order.

    Args:
        a: (tokens, rows, side_m).
        b: (tokens, columns, side_n), or if ``b_turned`` (columns, side_n, tokens); if ``places`` are of tiles that span
            its parts, these lie side by side.
        c: (blocks, side_m, side_n), contiguous, written.
        places: which parts those are, and the tiles; with those of ``beside``.
        beside: what else is made, or None.
        room: memory of any numbers, contiguous, that holds the sums of ranges where it is large enough, or None.
        spare: bytes that they may take elsewhere: the tokens are cut in no more ranges than fit in one of both.  None
            for any number.

    Raises:
        UnsupportedError: an operand's layout has no tensor descriptor.
    """
    results = [c] if beside is None else [c, beside.left, beside.right]
    tokens = len(a)
    if not tokens:
        for each in results:
            each.zero_()
        return
    cutting, listed = places
    tiles, count = cutting.tiles, len(listed)
    if not count:
        return
    entries = sum(each.numel() for each in results)
    held = None if spare is None else max(spare, 0 if room is None else room.numel() * room.itemsize)
    fit = None if held is None else held // (entries * torch.float32.itemsize)
    split = ranges(count, tokens, tiles.k, programs_on(a.device, tiles), a.element_size(), fit)
    sums = _sums(c, split, entries, room) if split > 1 else None
    operands = [a, b] if beside is None else [a, b, beside.dz, beside.z]
    made = _ready(tuple(map(form, operands)), tuple(map(form, results)), count, cutting, split, b_turned)
    written = results if sums is None else list(sums.split([each.numel() for each in results], dim=1))
    if not len(c):  # of which there is no descriptor
        written[0] = written[0].new_empty(1, 1, *c.shape[1:])
    made(*operands, listed, *written)
    if sums is not None:
        add_ranges(sums, results)


def _sums(like: Tensor, ranges: int, entries: int, room: Tensor | None) -> Tensor:
    """(ranges, entries) float32, in ``room`` if that is large enough."""
    size = ranges * entries * torch.float32.itemsize
    if room is None or room.numel() * room.itemsize < size:
        return like.new_empty(ranges, entries, dtype=torch.float32)
    return room[: size // room.itemsize].view(torch.float32).view(ranges, entries)


@lru_cache(maxsize=REMEMBERED)
def _ready(
    of_operands: tuple[Form, ...],
    of_results: tuple[Form, ...],
    count: int,
    cutting: Cutting,
    split: int,
    b_turned: bool,
) -> Ready:
    """Gradients of tensors of such forms, in the order of the template's arguments."""
    a, b, *thin = (each.like() for each in of_operands)
    tiles, abreast, spans = cutting
    results = [each.like() for each in of_results]
    side_m, side_n = results[0].shape[1:]
    written = [each[None] for each in results]
    if split > 1:
        sums = torch.empty(split, sum(each.numel() for each in results), device="meta")
        written = _of_ranges(sums, results)
        if a.dtype != torch.float32:
            tiles = tiles.with_parts(2 * tiles.parts)  # for an epilogue of twice the bytes
    if not len(results[0]):
        written[0] = written[0].new_empty(1, 1, side_m, side_n)
    box_a, box_b = (1, tiles.k, tiles.m), (1, tiles.n, tiles.k) if b_turned else (1, tiles.k, tiles.n)
    if spans:  # one part of all columns
        b = b.view(1, -1, b.shape[2]) if b_turned else b.view(len(b), 1, -1)
    of_b = b if b_turned else b.transpose(0, 1)
    operands = [Boxes(a.transpose(0, 1), box_a, operand=True), Boxes(of_b, box_b, operand=True)]
    if thin:
        dz, z = thin
        operands += [Boxes(dz[None], box_a, operand=True), Boxes(z[None], box_b, operand=True)]
        written[1] = written[1].unflatten(1, (-1, side_m))
        written[2] = written[2].unflatten(2, (-1, side_n)).transpose(1, 2)
    parameters: dict[str, Parameter] = {
        "side_m": side_m,
        "side_n": side_n,
        "rank": thin[0].shape[1] if thin else 0,
        "abreast": abreast,
        "spans": spans,
        "b_turned": b_turned,
    }
    takes = [*operands, None, *(Boxes(each, (1, 1, tiles.m, tiles.part)) for each in written)]
    sizes = (count * tiles.m, side_n, len(a))
    return ready("block_gradients", takes, sizes, count, parameters, tiles, a.dtype, of_operands[0].device, split)


def about(tokens: int) -> int:
    """So many tokens as tiles are placed for, of which few numbers are told apart: the nearest power of two."""
    return 1 << round(math.log2(max(tokens, 1)))


def placed(rows: Tensor, columns: Tensor, made: Gradients, tokens: int) -> Places:
    """The tiles of gradients summed over about so many tokens, cut for the device of ``rows``.

    Args:
        rows, columns: int32 (blocks,), the parts of a and b that each block's gradient takes; the host reads them.
        tokens: as :func:`about` has them, for callers that remember what is found.
    """
    cut = gradient_cut(rows.device, tokens, columns_of_rows(rows, columns, made.rows), made)
    return gradient_places(rows, columns, made, cut.cutting)


def _of_ranges(sums: Tensor, results: Sequence[Tensor]) -> list[Tensor]:
    """(ranges, *shape) of each result, in ``sums`` (ranges, entries)."""
    parts = sums.split([each.numel() for each in results], dim=1)
    return [part.unflatten(1, each.shape) for part, each in zip(parts, results, strict=True)]

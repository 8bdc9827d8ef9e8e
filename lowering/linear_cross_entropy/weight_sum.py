"""The weight's gradient in the scheme of exponentials: a product for each chunk, summed in 20 bits
(:mod:`~structfly.lowering.linear_cross_entropy.sums`).

A row's contribution at its own target can be far larger than its others, and the product forms it from two rounded
factors, the entry of the exponentials and factor x.  What they leave out,

    factor entry x - bfloat16(entry) bfloat16(factor x),

is added class by class in float32, chunk after chunk and in order of rows, so that results stay the same bit for bit.
It must be added before the sum is rounded, so before a chunk's product; for the first chunk, whose product begins the
sum, after it, which is why the first product never rounds and there are always two.  Where the gradient is stored
(hidden, classes), a class is a column and this is left out.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from structfly.lowering.gemm import IDLE, LibraryProduct, Product, Tiles
from structfly.lowering.launch import Launch
from structfly.lowering.linear_cross_entropy.live_rows import LiveRows
from structfly.lowering.linear_cross_entropy.pass_records import ChunkRows
from structfly.lowering.linear_cross_entropy.sums import new_plane, sum_product
from structfly.lowering.template import load, render

_BYTES, _ROWS = 128, 4  # of the lower plane and of a class, that a program takes at a time


class WeightSum:
    """Sums dW over chunks.

    Args:
        dw: (C, H) bfloat16, rows or columns contiguous.
        x: (N, H) hidden states.
        chunk: the buffers that every chunk fills anew.
        rows: the rows that count.
        outer: vectors (C,) and (H,) in float32 whose outer product is taken off, or None.
        beside: the product of the same rows that is launched before and runs beside, or None.
        tiles: of the products.
    """

    def __init__(
        self,
        dw: Tensor,
        x: Tensor,
        chunk: ChunkRows,
        rows: LiveRows,
        outer: tuple[Tensor, Tensor] | None,
        beside: Product | LibraryProduct | None,
        tiles: Tiles,
    ) -> None:
        self._dw, self._x, self._chunk, self._rows = dw, x, chunk, rows
        self._plane, self._part = new_plane(dw, tiles), tiles.part
        a, b, rounds = chunk.exps.t(), chunk.factor_x, IDLE if beside is None else beside.rounds
        self._first = sum_product(
            a, b, dw, self._plane, tiles, rows="K", begins="zero", ends="never", beside=rounds, outer=outer
        )
        self._later = sum_product(
            a, b, dw, self._plane, tiles, rows="K", begins="sums", ends="rows or second", beside=rounds
        )

    def add_targets(self, start: int) -> None:
        """Add what the product leaves out at the targets of the rows from ``start`` on: before the product of a chunk
        that is not the first, after that of the first."""
        if self._dw.stride(1) == 1:
            self._add_targets(self._rows.count, start)

    def sort_targets(self) -> None:
        """Do what :meth:`add_targets` needs done once, where there is room for it."""
        if self._dw.stride(1) == 1:
            _ = self._add_targets

    @cached_property
    def _add_targets(self) -> Launch:
        high, x, chunk, rows = self._dw.view(torch.uint16), self._x, self._chunk, self._rows
        length, hidden = chunk.factor_x.shape
        low = self._plane.view(len(high), -1)
        keys, order = rows.by_target()
        return Launch(
            _module(not x.is_cuda).add_targets,
            (length, -(-low.shape[1] // _BYTES)),
            {"CLASSES": len(high), "HIDDEN": hidden, "WIDTH": self._part, "BYTES": _BYTES, "ROWS": _ROWS},
            [
                *(keys, order, rows.index, x, x.stride(0), chunk.factor_x, chunk.factor, chunk.entry),
                *(high, high.stride(0), low, low.stride(0)),
            ],
            num_warps=2,
        )

    def add_product(self, start: int) -> None:
        """Add the product of the rows from ``start`` on, chunk after chunk."""
        product = self._later if start else self._first
        product(self._rows.count, start, 0)

    def close(self, chunks: int) -> None:
        """Round, where a second chunk has not."""
        if chunks == 1:
            self.add_product(len(self._chunk.factor_x))


@lru_cache(maxsize=2)
def _module(interpreted: bool) -> Any:
    return load(render("linear_cross_entropy_targets", interpreted=interpreted))

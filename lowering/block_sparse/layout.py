"""Where the blocks of a block-sparse weight stand, and the way between blocks, dense weights and masks.

A weight (out, in) is seen as a grid of blocks (block_out, block_in), which may reach beyond it.  The blocks that are
kept lie in ``values`` (nnz, block_out, block_in) from row to row, and within a row from left to right, as in the block
compressed sparse row format.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Self

import torch
from torch import Tensor

from structfly.errors import ArgumentError
from structfly.lowering.block_products.listing import member_counts
from structfly.lowering.remembered import remembered
from structfly.records.layer import LayerSizes

BLOCK_SIZES = (16, 32, 64, 128)
"""Sides of blocks that are whole tiles of a matrix product on any GPU."""


class Grid(NamedTuple):
    """Blocks that a weight (out, in) is seen in; together they cover it, and may reach beyond it."""

    rows: int
    columns: int
    block_out: int
    block_in: int

    @classmethod
    def covering(cls, sizes: LayerSizes, block_out: int, block_in: int) -> Self:
        """The smallest grid of such blocks."""
        return cls(-(-sizes.out_features // block_out), -(-sizes.in_features // block_in), block_out, block_in)

    def split(self, weight: Tensor) -> Tensor:
        """The blocks (rows, columns, block_out, block_in) of a weight (out, in), with zeros beyond its edges."""
        out_features, in_features = weight.shape
        more = (0, self.columns * self.block_in - in_features, 0, self.rows * self.block_out - out_features)
        padded = torch.nn.functional.pad(weight, more)
        return padded.view(self.rows, self.block_out, self.columns, self.block_in).transpose(1, 2)

    def join(self, blocks: Tensor, sizes: LayerSizes) -> Tensor:
        """The weight (out, in) of its blocks: the inverse of :meth:`split`."""
        dense = blocks.transpose(1, 2).reshape(self.rows * self.block_out, self.columns * self.block_in)
        return dense[: sizes.out_features, : sizes.in_features]

    def spread(self, kept: Tensor, sizes: LayerSizes) -> Tensor:
        """The mask (out, in) of a mask (rows, columns) of blocks."""
        rows = torch.arange(sizes.out_features, device=kept.device) // self.block_out
        columns = torch.arange(sizes.in_features, device=kept.device) // self.block_in
        return kept[rows[:, None], columns]


class BlockLayout(NamedTuple):
    """Which blocks of a grid are kept.

    Attributes:
        columns: int32; (rows, blocks a row) where every row of blocks keeps as many, else (nnz,): the column of each.
        starts: int32 (rows + 1,); the blocks of row i are ``starts[i]`` to ``starts[i + 1]``.  None where every row of
            blocks keeps as many.
    """

    columns: Tensor
    starts: Tensor | None = None

    @classmethod
    def of(cls, kept: Tensor, equal_rows: bool) -> Self:
        """The layout of a mask (rows, columns) of blocks; ``equal_rows`` where every row of blocks keeps as many."""
        columns = kept.nonzero()[:, 1].to(torch.int32)
        if equal_rows:
            return cls(columns.view(len(kept), -1))
        return cls(columns, torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0)).to(torch.int32))

    @property
    def block_rows(self) -> int:
        """Rows of blocks."""
        return len(self.columns) if self.starts is None else len(self.starts) - 1

    def rows(self) -> Tensor:
        """The row of each kept block: int32 (nnz,)."""
        every = torch.arange(self.block_rows, dtype=torch.int32, device=self.columns.device)
        if self.starts is None:
            return every.repeat_interleave(self.columns.shape[1])
        return every.repeat_interleave(self.starts.diff(), output_size=len(self.columns))

    def counts(self) -> list[int]:
        """How many blocks every row keeps."""
        if self.starts is None:
            return [self.columns.shape[1]] * self.block_rows
        return remembered(member_counts, self.starts)

    def take(self, weight: Tensor, grid: Grid) -> Tensor:
        """The kept blocks (nnz, block_out, block_in) of a weight (out, in)."""
        return grid.split(weight)[self.rows(), self.columns.flatten()]

    def place(self, values: Tensor, grid: Grid, sizes: LayerSizes) -> Tensor:
        """The weight (out, in) of kept blocks (nnz, block_out, block_in)."""
        blocks = values.new_zeros(grid).index_put((self.rows(), self.columns.flatten()), values)
        return grid.join(blocks, sizes)


def layout_of_mask(mask: Tensor, block_sizes: tuple[int, ...] = BLOCK_SIZES) -> tuple[Grid, BlockLayout]:
    """What a constant mask keeps of a weight, in the largest blocks that it is made of.

    Args:
        mask: (out, in), bool or any other dtype with no values but 0 and 1.
        block_sizes: the sides that blocks may have.

    Returns:
        The grid of blocks, whose last row and column may reach beyond the mask, and which of them are kept.

    Raises:
        ArgumentError: the mask is no matrix, has other values, keeps nothing, or is not made of such blocks.
    """
    if mask.ndim != 2:
        raise ArgumentError(f"the mask has shape {tuple(mask.shape)}; a mask of a weight (out, in) is allowed")
    kept = mask.bool()
    if bool((kept.to(mask.dtype) != mask).any()):
        raise ArgumentError("the mask has values other than 0 and 1; a weight to be scaled is not a mask")
    if not bool(kept.any()):
        raise ArgumentError("the mask keeps nothing of the weight")
    sides = _side(kept, "rows", block_sizes), _side(kept.t(), "columns", block_sizes)
    grid = Grid.covering(LayerSizes(mask.shape[1], mask.shape[0]), *sides)
    blocks = kept[:: grid.block_out, :: grid.block_in]
    counts = blocks.sum(1)
    return grid, BlockLayout.of(blocks, equal_rows=bool((counts == counts[0]).all()))


def _side(kept: Tensor, what: str, block_sizes: tuple[int, ...]) -> int:
    """The largest allowed side of blocks whose edges are all the places where a row differs from the next."""
    edges = (1 + (kept[1:] != kept[:-1]).any(1).nonzero()[:, 0]).tolist()
    for side in sorted(block_sizes, reverse=True):
        if math.gcd(*edges) % side == 0:
            return side
    allowed = ", ".join(map(str, sorted(block_sizes)))
    wrong = next(edge for edge in edges if edge % min(block_sizes))
    raise ArgumentError(
        f"the mask changes between {what} {wrong - 1} and {wrong}; its blocks must have sides of {allowed}"
    )

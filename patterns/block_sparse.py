"""Block-sparse: W is zero but for some blocks, the projection choosing which and refitting them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar, Literal, Self, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from structfly.lowering.block_sparse.layout import BlockLayout, Grid
from structfly.lowering.block_sparse.op import BLOCK_SPARSE
from structfly.patterns.block_refit import BlockRefit
from structfly.patterns.blocks import cost_of_blocks, random_values
from structfly.patterns.menus import worth_offering
from structfly.patterns.structure import Factor, Factors, Structure
from structfly.patterns.whitening import Covariances
from structfly.records.layer import NO_STATISTICS, LayerCost, LayerSizes, LayerStatistics

BlockSize: TypeAlias = Literal[16, 32, 64, 128]

_SIDES: tuple[BlockSize, ...] = (16, 32, 64, 128)
_DENSITIES = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4)  # that a menu offers, for each of two sizes of blocks
_FEWEST = 6  # blocks along the weight's short side, so that a menu's densities differ


class BlockSparse(Structure):
    """W = blocks (block_out, block_in) in some places of their grid, zeros elsewhere; the grid may reach beyond W."""

    name: ClassVar[str] = "block_sparse"

    density: float = Field(gt=0, le=1)
    """Part of all blocks that is kept, rounded to a whole number of blocks, at least one."""

    block_out: BlockSize = 32
    """Outputs of a block."""

    block_in: BlockSize = 32
    """Inputs of a block."""

    equal_rows: bool = False
    """Whether every row of blocks keeps as many, so that products are batched; ``density`` is then of each row."""

    def grid(self, sizes: LayerSizes) -> Grid:
        """All blocks, kept or not."""
        return Grid.covering(sizes, self.block_out, self.block_in)

    def blocks(self, sizes: LayerSizes) -> int:
        """How many blocks are kept."""
        grid = self.grid(sizes)
        if self.equal_rows:
            return grid.rows * max(1, round(self.density * grid.columns))
        return max(1, round(self.density * grid.rows * grid.columns))

    def why_not(self, sizes: LayerSizes) -> str:
        fits = self.block_out <= sizes.out_features and self.block_in <= sizes.in_features
        return "" if fits else "blocks must not be larger than the weight there"

    def factors(self, sizes: LayerSizes) -> Mapping[str, Factor]:
        blocks, rows = self.blocks(sizes), self.grid(sizes).rows
        values = Factor((blocks, self.block_out, self.block_in))
        if self.equal_rows:
            return {"values": values, "columns": Factor((rows, blocks // rows), learned=False)}
        return {
            "values": values,
            "columns": Factor((blocks,), learned=False),
            "starts": Factor((rows + 1,), learned=False),
        }

    def cost(self, sizes: LayerSizes, dtype: torch.dtype) -> LayerCost:
        indices = sum(math.prod(factor.shape) for factor in self.factors(sizes).values() if not factor.learned)
        return cost_of_blocks(self.grid(sizes), self.blocks(sizes), indices, sizes, dtype)

    def initial(self, sizes: LayerSizes, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        kept = self._spread(sizes, generator)
        return {"values": random_values(kept, self.grid(sizes), sizes, generator), **self._indices(kept)}

    @classmethod
    def project_each(
        cls, choices: Iterable[Self], weight: Tensor, statistics: LayerStatistics = NO_STATISTICS
    ) -> Iterator[dict[str, Tensor]]:
        """The blocks that cost most to leave out one by one, tr(G_ii W_ij A_jj W_ij^T), and their least-squares refit.

        Where that is farther from ``weight`` than its blocks of the largest Frobenius norms are as they stand, those
        are refitted instead.  Without statistics they are the nearest there is.
        """
        covariances = Covariances.of(statistics, weight)
        for each in choices:
            yield each._near(weight, statistics, covariances)

    def _near(self, weight: Tensor, statistics: LayerStatistics, covariances: Covariances) -> dict[str, Tensor]:
        sizes = LayerSizes(weight.shape[1], weight.shape[0])
        grid = self.grid(sizes)
        kept = self._largest(self._losses(weight, statistics))
        made = BlockRefit(kept, grid, sizes, covariances, weight)(weight)
        plainly = self._largest(self._losses(weight, NO_STATISTICS))
        plain = weight * grid.spread(plainly, sizes)
        if statistics.loss_of(made - weight) > statistics.loss_of(plain - weight):
            kept, made = plainly, BlockRefit(plainly, grid, sizes, covariances, weight)(weight)
        return {"values": BlockLayout.of(kept, self.equal_rows).take(made, grid), **self._indices(kept)}

    def to_dense(self, sizes: LayerSizes, factors: Factors) -> Tensor:
        return _layout(factors).place(factors["values"], self.grid(sizes), sizes)

    def apply(self, sizes: LayerSizes, factors: Factors, x: Tensor, bias: Tensor | None) -> Tensor:
        tensors = [factors[name] for name in self.factors(sizes)]
        return BLOCK_SPARSE(x, tensors, bias, [sizes.out_features, self.grid(sizes).columns])

    @classmethod
    def menu(cls, sizes: LayerSizes) -> list[Self]:
        sides = [side for side in _SIDES if _FEWEST * side <= min(sizes)][-2:]
        offered = [
            cls(density=density, block_out=side, block_in=side, equal_rows=True)
            for side in sides
            for density in _DENSITIES
        ]
        different = {(each.block_in, each.blocks(sizes)): each for each in offered}
        return worth_offering(different.values(), sizes)

    def _indices(self, kept: Tensor) -> dict[str, Tensor]:
        columns, starts = BlockLayout.of(kept, self.equal_rows)
        return {"columns": columns} if starts is None else {"columns": columns, "starts": starts}

    def _losses(self, weight: Tensor, statistics: LayerStatistics) -> Tensor:
        """tr(G_ii W_ij A_jj W_ij^T) of all blocks: (rows, columns)."""
        left = right = self.grid(LayerSizes(weight.shape[1], weight.shape[0])).split(weight)
        if statistics.output_fisher is not None:
            left = _diagonal_blocks(statistics.output_fisher.to(weight), self.block_out)[:, None] @ left
        if statistics.input_covariance is not None:
            right = right @ _diagonal_blocks(statistics.input_covariance.to(weight), self.block_in)
        return (left * right).sum((2, 3))

    def _largest(self, scores: Tensor) -> Tensor:
        """The mask of the blocks of the largest scores (rows, columns)."""
        rows, columns = scores.shape
        count = self.blocks(LayerSizes(columns * self.block_in, rows * self.block_out))
        kept = torch.zeros_like(scores, dtype=torch.bool)
        if self.equal_rows:
            return kept.scatter_(1, scores.topk(count // rows, dim=1).indices, True)
        kept.view(-1)[scores.flatten().topk(count).indices] = True
        return kept

    def _spread(self, sizes: LayerSizes, generator: torch.Generator | None) -> Tensor:
        """A random mask that keeps about as many blocks in every row and in every column.

        Rows and columns of blocks are shuffled, then diagonals are kept, one after another.
        """
        rows, columns, *_ = self.grid(sizes)
        row = torch.randperm(rows, generator=generator)[:, None] * columns // rows
        diagonal = (torch.randperm(columns, generator=generator) - row) % columns
        return self._largest(torch.rand(rows, columns, generator=generator) - diagonal)


def _layout(factors: Factors) -> BlockLayout:
    return BlockLayout(factors["columns"], factors.get("starts"))


def _diagonal_blocks(covariance: Tensor, side: int) -> Tensor:
    """(blocks, side, side), with zeros beyond the edge."""
    features = len(covariance)
    blocks = Grid.covering(LayerSizes(features, features), side, side).split(covariance)
    return blocks.diagonal().permute(2, 0, 1)

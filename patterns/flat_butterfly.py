"""Flat block butterfly: a fixed pattern of blocks, the first-order part of a product of butterfly factors.

Pixelated Butterfly (Chen et al. 2021, arXiv 2112.00029).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar, Self

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

_SMALLEST_SIDE = 16  # of the blocks that a menu offers
_LEAST_DENSITY = 0.09  # that a menu offers


class FlatButterfly(Structure):
    """W in grid x grid blocks, those at (i, i) and at (i, i xor 2^f) for f < n_factors; the rest is zero.

    The grid is stretched over W whatever its sizes: a block has ceil(out / grid) outputs and ceil(in / grid) inputs,
    and the last may reach beyond W.
    """

    name: ClassVar[str] = "flat_butterfly"

    grid: int = Field(ge=1)
    """Blocks along a side, a power of two."""

    n_factors: int = Field(ge=0)
    """Butterfly factors, at most log2(grid); 0 is block-diagonal."""

    def why_not(self, sizes: LayerSizes) -> str:
        if self.grid & (self.grid - 1):
            return "grid must be a power of two"
        if self.n_factors >= self.grid.bit_length():
            return f"n_factors is at most {self.grid.bit_length() - 1} with that grid"
        return "" if self.grid <= min(sizes) else f"grid is at most {min(sizes)} there"

    def blocks(self, sizes: LayerSizes) -> Grid:
        """All blocks, kept or not."""
        n = self.grid
        return Grid(n, n, -(-sizes.out_features // n), -(-sizes.in_features // n))

    def columns(self) -> Tensor:
        """The columns of each row's blocks, from left to right: int32 (grid, n_factors + 1)."""
        rows = torch.arange(self.grid, dtype=torch.int32)[:, None]
        flips = torch.tensor([0, *(1 << f for f in range(self.n_factors))], dtype=torch.int32)
        return (rows ^ flips).sort(dim=1).values

    def mask(self) -> Tensor:
        """bool (grid, grid): which blocks are kept."""
        kept = torch.zeros(self.grid, self.grid, dtype=torch.bool)
        return kept.scatter_(1, self.columns().long(), True)

    def factors(self, sizes: LayerSizes) -> Mapping[str, Factor]:
        _, _, block_out, block_in = self.blocks(sizes)
        each = self.n_factors + 1
        return {
            "values": Factor((self.grid * each, block_out, block_in)),
            "columns": Factor((self.grid, each), learned=False),
        }

    def cost(self, sizes: LayerSizes, dtype: torch.dtype) -> LayerCost:
        kept = self.grid * (self.n_factors + 1)
        return cost_of_blocks(self.blocks(sizes), kept, kept, sizes, dtype)

    def initial(self, sizes: LayerSizes, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        values = random_values(self.mask(), self.blocks(sizes), sizes, generator)
        return {"values": values, "columns": self.columns()}

    @classmethod
    def project_each(
        cls, choices: Iterable[Self], weight: Tensor, statistics: LayerStatistics = NO_STATISTICS
    ) -> Iterator[dict[str, Tensor]]:
        """Least squares; where the statistics have an output Fisher, some steps of it, each over a row of blocks."""
        covariances = Covariances.of(statistics, weight)
        for each in choices:
            yield each.take(each.refit(weight, covariances)(weight))

    def refit(self, weight: Tensor, covariances: Covariances) -> BlockRefit:
        """The least squares of these blocks, for weights like ``weight`` (out, in)."""
        sizes = LayerSizes(weight.shape[1], weight.shape[0])
        return BlockRefit(self.mask(), self.blocks(sizes), sizes, covariances, weight)

    def take(self, weight: Tensor) -> dict[str, Tensor]:
        """The factors of a weight (out, in) that is zero outside the blocks."""
        columns = self.columns().to(weight.device)
        grid = self.blocks(LayerSizes(weight.shape[1], weight.shape[0]))
        return {"values": BlockLayout(columns).take(weight, grid), "columns": columns}

    def to_dense(self, sizes: LayerSizes, factors: Factors) -> Tensor:
        return BlockLayout(factors["columns"]).place(factors["values"], self.blocks(sizes), sizes)

    def apply(self, sizes: LayerSizes, factors: Factors, x: Tensor, bias: Tensor | None) -> Tensor:
        return BLOCK_SPARSE(x, [factors["values"], factors["columns"]], bias, [sizes.out_features, self.grid])

    @classmethod
    def menu(cls, sizes: LayerSizes) -> list[Self]:
        grids = [1 << k for k in range(2, 7) if min(sizes) >= _SMALLEST_SIDE << k]
        offered = (cls(grid=n, n_factors=f) for n in grids for f in range(1, n.bit_length()))
        return worth_offering((each for each in offered if (each.n_factors + 1) / each.grid >= _LEAST_DENSITY), sizes)

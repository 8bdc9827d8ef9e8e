"""BLAST (Lee et al. 2024, arXiv 2410.21262): blocks that share their factors, W_ij = left_i diag(scale_ij) right_j.

All blocks of a row share the span of their columns, all blocks of a column that of their rows; a vector for each block
says how much of each component it has.  Low rank, block-diagonal and Monarch weights are special cases.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar, Self

import sympy
import torch
from pydantic import Field
from torch import Tensor

from structfly.lowering.blast.op import BLAST
from structfly.patterns.blast_projection import project_each
from structfly.patterns.menus import worth_offering
from structfly.patterns.structure import Factor, Factors, Structure
from structfly.records.layer import NO_STATISTICS, TOKENS, LayerCost, LayerSizes, LayerStatistics, product

_BLOCKS = (2, 4, 8)
_DENSITIES = (0.1, 0.2, 0.35, 0.5, 0.75)  # parameters that a menu offers, relative to the dense weight's


class Blast(Structure):
    """W_ij = left_i (out_block, rank) diag(scale_ij) right_j (rank, in_block)."""

    name: ClassVar[str] = "blast"

    rank: int = Field(ge=1)
    """Components, which every block has."""

    row_blocks: int = Field(ge=1)
    """Blocks that the outputs are cut into; the last may be smaller."""

    column_blocks: int = Field(ge=1)
    """Blocks that the inputs are cut into; the last may be smaller."""

    rematerialise: bool = False
    """Whether backward makes the components of the inputs' blocks again rather than keep them, which are often more
    numbers than the layer's inputs and outputs.  GPUs then take a chunk of tokens at a time, in as little memory as the
    dense weight's layer where that can be, and in more time."""

    iterations: int = Field(default=8, ge=1)
    """Rounds of alternating least squares in a projection."""

    def why_not(self, sizes: LayerSizes) -> str:
        if self.rank > min(sizes):
            return f"rank is at most {min(sizes)} there, with which every weight has this structure"
        inner, outer = self._sides(sizes)
        for count, side, features, name in (
            (self.row_blocks, outer, sizes.out_features, "row"),
            (self.column_blocks, inner, sizes.in_features, "column"),
        ):
            if (count - 1) * side >= features:
                return f"{count} {name} blocks of {side} are more than {features} features fill"
        return ""

    def factors(self, sizes: LayerSizes) -> Mapping[str, Factor]:
        inner, outer = self._sides(sizes)
        return {
            "right": Factor((self.column_blocks, self.rank, inner)),
            "scale": Factor((self.rank, self.row_blocks, self.column_blocks)),
            "left": Factor((self.row_blocks, outer, self.rank)),
        }

    def cost(self, sizes: LayerSizes, dtype: torch.dtype) -> LayerCost:
        inner, outer = self._sides(sizes)
        rows, columns, rank = self.row_blocks, self.column_blocks, self.rank
        parameters = rank * (rows * outer + columns * inner + rows * columns)
        row = sympy.ceiling(TOKENS / 8) * 8 * dtype.itemsize  # to which components are padded
        kept, mixed = rank * columns, rank * rows
        # Beside what is kept stand first the padded input, or the same not padded yet; at last what the outputs' blocks
        # have of it, the outputs of all blocks, and again in order, the output among them.
        padded = columns * inner if columns * inner > sizes.in_features else 0
        given = 2 * rows * outer if rows > 1 else sizes.out_features
        beside = max(padded, kept, mixed + given)
        return LayerCost(
            parameters=parameters,
            flops=2 * TOKENS * parameters,
            weight_bytes=parameters * dtype.itemsize,
            saved_bytes=0 if self.rematerialise else row * kept,
            transient_bytes=row * (kept + beside) - TOKENS * dtype.itemsize * sizes.out_features,
            stages=(
                product(inner, rank, dtype, batch=columns),
                product(columns, rows, dtype, batch=rank),
                product(rank, outer, dtype, batch=rows),
            ),
        )

    def initial(self, sizes: LayerSizes, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        # An entry is a sum over the rank: its variance is rank var(left) var(scale) var(right).
        shapes = {name: factor.shape for name, factor in self.factors(sizes).items()}
        return {
            "right": torch.randn(shapes["right"], generator=generator) / sizes.in_features**0.5,
            "scale": torch.randn(shapes["scale"], generator=generator),
            "left": torch.randn(shapes["left"], generator=generator) / (3 * self.rank) ** 0.5,
        }

    @classmethod
    def project_each(
        cls, choices: Iterable[Self], weight: Tensor, statistics: LayerStatistics = NO_STATISTICS
    ) -> Iterator[dict[str, Tensor]]:
        """Alternating least squares; see :mod:`structfly.patterns.blast_projection`."""
        settings = [(each.rank, each.row_blocks, each.column_blocks, each.iterations) for each in choices]
        for right, scale, left in project_each(settings, weight, statistics):
            yield {"right": right, "scale": scale, "left": left}

    def to_dense(self, sizes: LayerSizes, factors: Factors) -> Tensor:
        right, scale, left = factors["right"], factors["scale"], factors["left"]
        scaled = scale.permute(1, 0, 2)[..., None] * right.transpose(0, 1)  # (row_blocks, rank, column_blocks, in)
        return (left @ scaled.flatten(2)).flatten(0, 1)[: sizes.out_features, : sizes.in_features]

    def apply(self, sizes: LayerSizes, factors: Factors, x: Tensor, bias: Tensor | None) -> Tensor:
        in_order = [factors["right"], factors["scale"], factors["left"]]
        return BLAST(x, in_order, bias, [sizes.out_features], rematerialise=self.rematerialise)

    @classmethod
    def menu(cls, sizes: LayerSizes) -> list[Self]:
        offered = []
        for blocks in _BLOCKS:
            for density in _DENSITIES:
                rank = int(density * sizes.parameters / (sum(sizes) + blocks**2))
                offered.append(cls(rank=max(rank, 1), row_blocks=blocks, column_blocks=blocks))
        return worth_offering(offered, sizes)

    def _sides(self, sizes: LayerSizes) -> LayerSizes:
        """Inputs and outputs of a block."""
        return LayerSizes(-(-sizes.in_features // self.column_blocks), -(-sizes.out_features // self.row_blocks))

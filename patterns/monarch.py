"""Monarch: two block-diagonal factors with a permutation between them (Dao et al., arXiv 2204.00595)."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field

from structfly.lowering.kronecker.reference import FactorShape
from structfly.patterns.chain import Chain
from structfly.records.layer import LayerSizes

_BLOCKS = (2, 4, 8, 16)  # that a menu offers, of inputs and outputs alike
_DENSITIES = (1 / 8, 1 / 4, 1 / 2, 3 / 4)  # that a menu offers, of the dense parameters


class Monarch(Chain):
    """Inputs in ``blocks_in`` runs, outputs in ``blocks_out`` sets: W from a run to a set has rank ``block_rank``.

    With l = blocks_out the sets are W[l0::l], as in the paper, or runs of neighbours (``strided`` off: block low rank).
    Sizes that the blocks do not divide are padded.
    """

    name: ClassVar[str] = "monarch"

    blocks_in: int = Field(ge=1)
    """Blocks of the first factor."""

    blocks_out: int = Field(ge=1)
    """Blocks of the second factor."""

    block_rank: int = Field(ge=1)
    """Of what leads from one block of inputs to one block of outputs."""

    strided: bool = True
    """Whether a block of outputs is every ``blocks_out``-th of them rather than a run of neighbours."""

    def shapes(self, sizes: LayerSizes) -> tuple[FactorShape, ...]:
        inputs, outputs = -(-sizes.in_features // self.blocks_in), -(-sizes.out_features // self.blocks_out)
        i, q = (outputs, 1) if self.strided else (1, outputs)
        # Between the factors: (blocks_in, block_rank, blocks_out).
        return (
            FactorShape(d=1, a=self.blocks_in, i=self.block_rank * self.blocks_out, q=1, j=inputs, p=1),
            FactorShape(d=self.blocks_out, a=1, i=i, q=q, j=self.blocks_in * self.block_rank, p=1),
        )

    def why_not(self, sizes: LayerSizes) -> str:
        if self.blocks_in > sizes.in_features:
            return f"blocks_in is at most {sizes.in_features} there"
        if self.blocks_out > sizes.out_features:
            return f"blocks_out is at most {sizes.out_features} there"
        first, second = self.shapes(sizes)
        most = min(first.columns, second.rows)
        return "" if self.block_rank <= most else f"block_rank is at most {most} there"

    @classmethod
    def menu(cls, sizes: LayerSizes) -> list[Self]:
        made: list[Self] = []
        for blocks in (b for b in _BLOCKS if b <= min(sizes)):
            one = cls(blocks_in=blocks, blocks_out=blocks, block_rank=1)
            each = sum(shape.parameters for shape in one.shapes(sizes))
            ranks = {int(density * sizes.parameters / each) for density in _DENSITIES} - {0}
            choices = (one.model_copy(update={"block_rank": rank}) for rank in sorted(ranks))
            made += [choice for choice in choices if not choice.why_not(sizes) and choice.is_worthwhile(sizes)]
        return made

"""Block butterfly: B_g ... B_4 B_2 on a grid of g x g blocks (Dao et al., arXiv 2112.00029, definition 3.2)."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field

from structfly.lowering.kronecker.reference import FactorShape
from structfly.patterns.chain import Chain
from structfly.records.layer import LayerSizes

_LEAST_BLOCK = 4  # rows and columns of a block that a menu offers


class BlockButterfly(Chain):
    """W = B_g ... B_4 B_2 with g = ``grid``: B_k is block-diagonal, g / k times [[D_1, D_2], [D_3, D_4]], each D
    block-diagonal with k / 2 blocks.

    The blocks of B_2 take in_features / g features, those of B_g give out_features / g; between the factors a block has
    the smaller of the two, rounded up.  Sizes that the grid does not divide are padded.
    """

    name: ClassVar[str] = "block_butterfly"

    grid: int = Field(ge=2)
    """Blocks along each side, a power of two."""

    def shapes(self, sizes: LayerSizes) -> tuple[FactorShape, ...]:
        inputs, outputs = -(-sizes.in_features // self.grid), -(-sizes.out_features // self.grid)
        count = self.grid.bit_length() - 1
        widths = [inputs, *[min(inputs, outputs)] * (count - 1), outputs]
        return tuple(
            FactorShape(d=2**t, a=self.grid >> (t + 1), i=2, q=widths[t + 1], j=2, p=widths[t]) for t in range(count)
        )

    def why_not(self, sizes: LayerSizes) -> str:
        if self.grid & (self.grid - 1):
            return "grid is a power of two"
        return "" if self.grid <= min(sizes) else f"grid is at most {min(sizes)} there"

    @classmethod
    def menu(cls, sizes: LayerSizes) -> list[Self]:
        grids = (2**power for power in range(1, (min(sizes) // _LEAST_BLOCK).bit_length()))
        return [choice for choice in (cls(grid=grid) for grid in grids) if choice.is_worthwhile(sizes)]

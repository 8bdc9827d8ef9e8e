"""Where the blocks stand that a mask keeps, found when a mask is first seen and again when it has changed.

What is compiled holds for masks that keep as many blocks of the same size, whichever they are.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from structfly.errors import ArgumentError
from structfly.lowering.block_sparse.layout import BlockLayout, Grid, layout_of_mask
from structfly.patterns.followed import Followed
from structfly.patterns.masked_linear.site import MaskedSite
from structfly.rewriter.inputs import UnfitError


def placed(grid: Grid, layout: BlockLayout) -> list[Tensor]:
    """``layout``'s tensors, and the number of each kept block among all blocks of the grid, from row to row: int32."""
    numbers = layout.rows() * grid.columns + layout.columns.flatten()
    return [numbers, *(tensor for tensor in layout if tensor is not None)]


def layouts_of(site: MaskedSite) -> Followed:
    """The layouts, as :func:`placed` has them, of every mask that one site is run with."""
    masked, mask, grid, layout = site.masked, site.mask, site.grid, site.layout
    compiled, whose = placed(grid, layout), f"the mask of {site.name or 'a linear'}"
    like, in_words = [(tensor.shape, tensor.device) for tensor in compiled], _in_words(grid, layout)

    def make(leaves: Sequence[Tensor]) -> list[Tensor]:
        try:
            found = layout_of_mask(masked.kept(mask.value(leaves)))
        except ArgumentError as error:
            raise UnfitError(f"{whose} has changed: {error}") from error
        tensors = placed(*found)
        if found[0] != grid or [(tensor.shape, tensor.device) for tensor in tensors] != like:
            raise UnfitError(f"{whose} keeps {_in_words(*found)}; compiled were {in_words}")
        return tensors

    return Followed(mask.places, compiled, make)


def _in_words(grid: Grid, layout: BlockLayout) -> str:
    where = "in all rows" if layout.starts is not None else "as many in each row"
    return f"{layout.columns.numel()} blocks of {grid.block_out} x {grid.block_in}, {where}"

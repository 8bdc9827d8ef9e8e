"""The blocks of a layout listed by row and by column, and the tiles of their gradients: found once for each layout."""

from __future__ import annotations

import torch
from torch import Tensor

from structfly.lowering.block_products.gradient_places import Gradients, Places
from structfly.lowering.block_products.gradients import about, placed
from structfly.lowering.block_products.listing import Listing, in_each, listed
from structfly.lowering.block_sparse.layout import BlockLayout
from structfly.lowering.remembered import remembered


def by_rows(layout: BlockLayout) -> Listing:
    """For products with W."""
    columns = layout.columns.flatten()
    if layout.starts is not None:
        return Listing(columns, None, layout.starts, remembered(in_each, layout.starts))
    return Listing(columns, None, remembered(_equal_starts, layout.columns), layout.columns.shape[1])


def by_columns(layout: BlockLayout, columns: int) -> Listing:
    """For products with W^T; ``columns`` are those of the grid."""
    return remembered(_columns, *layout, columns)


def of_gradients(layout: BlockLayout, made: Gradients, tokens: int) -> Places:
    """For the gradients of the blocks and what ``made`` has beside them, summed over so many tokens."""
    return remembered(_gradients, *layout, made, about(tokens))


def _gradients(columns: Tensor, starts: Tensor | None, made: Gradients, tokens: int) -> Places:
    return placed(BlockLayout(columns, starts).rows(), columns.flatten(), made, tokens)


def _columns(columns: Tensor, starts: Tensor | None, count: int) -> Listing:
    return listed(columns.flatten(), BlockLayout(columns, starts).rows(), count)


def _equal_starts(columns: Tensor) -> Tensor:
    rows, each = columns.shape
    return each * torch.arange(rows + 1, dtype=torch.int32, device=columns.device)

"""The blocks of a layout listed by column, for products with the transpose: found once for each layout."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from structfly.lowering.block_sparse.layout import BlockLayout


class Listing(NamedTuple):
    """Parts of a result, each the sum of as many products as it has members.

    Attributes:
        sources: int32 (nnz,), the part of the source that each member takes, those of part 0 first.
        blocks: int32 (nnz,), the block of each member; None for the first, the second, and so on.
        starts: int32 (parts + 1,), where the members of each part begin.
        each: how many members every part has, or 0 where they differ.
    """

    sources: Tensor
    blocks: Tensor | None
    starts: Tensor
    each: int


def by_rows(layout: BlockLayout) -> Listing:
    """For products with W."""
    return _listed(layout, -1)


def by_columns(layout: BlockLayout, columns: int) -> Listing:
    """For products with W^T; ``columns`` are those of the grid."""
    return _listed(layout, columns)


_LISTINGS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # by a layout's columns


def _listed(layout: BlockLayout, columns: int) -> Listing:
    """Kept until the layout's tensors are written: finding out whether all parts have as many waits for the device."""
    versions = tuple(each._version for each in layout if each is not None)
    known = _LISTINGS.setdefault(layout.columns, {})
    if columns not in known or known[columns][0] != versions:
        known[columns] = versions, _rows(layout) if columns < 0 else _columns(layout, columns)
    found: Listing = known[columns][1]
    return found


def _rows(layout: BlockLayout) -> Listing:
    if layout.starts is not None:
        return Listing(layout.columns, None, layout.starts, _in_each(layout.starts))
    rows, each = layout.columns.shape
    starts = each * torch.arange(rows + 1, dtype=torch.int32, device=layout.columns.device)
    return Listing(layout.columns.flatten(), None, starts, each)


def _columns(layout: BlockLayout, count: int) -> Listing:
    columns, order = layout.columns.flatten().sort(stable=True)
    edges = torch.arange(count + 1, dtype=columns.dtype, device=columns.device)
    starts = torch.searchsorted(columns, edges).to(torch.int32)
    return Listing(layout.rows()[order].contiguous(), order.to(torch.int32), starts, _in_each(starts))


def _in_each(starts: Tensor) -> int:
    counts = starts.diff().unique().tolist()
    return int(counts[0]) if len(counts) == 1 else 0

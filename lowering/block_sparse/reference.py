"""The eager reference, which is the op's specification."""

from __future__ import annotations

from torch import Tensor

from structfly.lowering.block_sparse.layout import BlockLayout, Grid
from structfly.records.layer import LayerSizes


def block_sparse_reference(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    starts: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    out_features: int,
    block_columns: int,
) -> Tensor:
    """y = W x + bias, with W zero but for its kept blocks.

    Args:
        x: (*rows, in).
        values: (nnz, block_out, block_in), the kept blocks from row to row of blocks.
        columns, starts: where they stand, see :class:`~structfly.lowering.block_sparse.layout.BlockLayout`.
        bias: (out,), or None.
        out_features: of W; the grid of blocks may reach beyond it.
        block_columns: columns of the grid.

    Returns:
        (*rows, out).
    """
    layout = BlockLayout(columns, starts)
    grid = Grid(layout.block_rows, block_columns, values.shape[1], values.shape[2])
    y = x @ layout.place(values, grid, LayerSizes(x.shape[-1], out_features)).t()
    return y if bias is None else y + bias

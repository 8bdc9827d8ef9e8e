"""The eager reference, which is the op's specification."""

from __future__ import annotations

from torch import Tensor

from structfly.lowering.block_sparse.reference import block_sparse_reference
from structfly.lowering.low_rank.reference import low_rank_reference


def block_sparse_low_rank_reference(
    x: Tensor,
    values: Tensor,
    right: Tensor,
    left: Tensor,
    columns: Tensor,
    starts: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    out_features: int,
    block_columns: int,
) -> Tensor:
    """y = (B + left right) x + bias, B made of blocks.

    Args:
        x: (*rows, in).
        values, columns, starts, out_features, block_columns: of B, see
            :func:`~structfly.lowering.block_sparse.reference.block_sparse_reference`.
        right: (rank, in).
        left: (out, rank).
        bias: (out,), or None.

    Returns:
        (*rows, out).
    """
    sparse = block_sparse_reference(x, values, columns, starts, out_features=out_features, block_columns=block_columns)
    return sparse + low_rank_reference(x, right, left, bias)

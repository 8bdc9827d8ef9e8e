"""The eager reference, which is the op's specification."""

from __future__ import annotations

import torch
from torch import Tensor


def blast_reference(
    x: Tensor, right: Tensor, scale: Tensor, left: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """y = W x + bias, block (i, j) of W being left_i diag(scale_ij) right_j.

    Args:
        x: (*rows, in).
        right: (column_blocks, rank, ceil(in / column_blocks)).
        scale: (rank, row_blocks, column_blocks).
        left: (row_blocks, ceil(out_features / row_blocks), rank).
        bias: (out_features,), or None.
        out_features: W's rows; rows and columns of the last blocks beyond W's are left out.

    Returns:
        (*rows, out_features).
    """
    blocks = torch.einsum("imr,rij,jrn->imjn", left, scale, right)
    weight = blocks.flatten(2).flatten(0, 1)[:out_features, : x.shape[-1]]
    y = x @ weight.t()
    return y if bias is None else y + bias

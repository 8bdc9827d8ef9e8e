"""The eager reference, which is the op's specification."""

from __future__ import annotations

import torch
from torch import Tensor


def pivoted_low_rank_reference(
    x: Tensor, pivots: Tensor, mixing: Tensor, order: Tensor, bias: Tensor | None = None
) -> Tensor:
    """y_i = (pivots x, mixing pivots x)_order(i) + bias_i.

    Args:
        x: (*rows, in).
        pivots: (rank, in), rows of the weight.
        mixing: (out - rank, rank), what the other rows are made of.
        order: (out,) int32, where each output stands: below rank among the pivots, else among the others.
        bias: (out,), or None.

    Returns:
        (*rows, out).
    """
    kept = x @ pivots.t()
    y = torch.cat((kept, kept @ mixing.t()), -1).index_select(-1, order)
    return y if bias is None else y + bias

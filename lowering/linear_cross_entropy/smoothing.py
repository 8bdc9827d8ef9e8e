"""Label smoothing's term in the scheme of exponentials: the same for all rows but for their coefficient.

It takes c_n f' share w_v off every dz_nv, with share = smoothing / C, class weights w and constant f'.  That is an
outer product: dx has -c_n f' share (sum_v w_v W_v) more, and dW_v has -w_v (sum_n c_n f' share x_n).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows that are upcast at a time, and that are summed at a time: both take memory.
_UPCAST_ROWS, _SUMMED_ROWS = 1024, 8192


def weighted_classes(weight: Tensor, bias: Tensor | None, class_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """sum_v w_v W_v (H,) and sum_v w_v b_v (), in float32."""
    if class_weight is None:
        total = weight.new_zeros(weight.shape[1], dtype=torch.float32)
        for start in range(0, len(weight), _SUMMED_ROWS):
            total += weight[start : start + _SUMMED_ROWS].sum(0, dtype=torch.float32)
    else:
        total = weighted_rows(weight, class_weight)
    if bias is None:
        return total, total.new_zeros(())
    return total, bias.float().sum() if class_weight is None else class_weight @ bias.float()


def weighted_rows(x: Tensor, weights: Tensor) -> Tensor:
    """sum_n weights_n x_n (H,) in float32."""
    total = x.new_zeros(x.shape[1], dtype=torch.float32)
    for start in range(0, x.shape[0], _UPCAST_ROWS):
        part = slice(start, start + _UPCAST_ROWS)
        total += weights[part] @ x[part].float()
    return total

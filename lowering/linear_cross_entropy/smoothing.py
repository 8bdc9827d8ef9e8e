"""Label smoothing's term in the scheme of exponentials: the same for all rows but for their coefficient.

It takes c_n f' share w_v off every dz_nv, with share = smoothing / C, class weights w and constant f'.  That is an
outer product: dx has -c_n f' share (sum_v w_v W_v) more, and dW_v has -w_v (sum_n c_n f' share x_n).
"""

from __future__ import annotations

import torch
from torch import Tensor

from structfly.lowering.gemm import float32_product

_UPCAST_ROWS = 1024  # at a time: it takes memory


def weighted_classes(weight: Tensor, bias: Tensor | None, class_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """sum_v w_v W_v (H,) and sum_v w_v b_v (), in float32."""
    total = _sum_of_rows(weight) if class_weight is None else weighted_rows(weight, class_weight)
    if bias is None:
        return total, total.new_zeros(())
    return total, bias.float().sum() if class_weight is None else class_weight @ bias.float()


def _sum_of_rows(weight: Tensor) -> Tensor:
    """sum_v W_v (H,) in float32."""
    if not weight.is_cuda:
        return weight.sum(0, dtype=torch.float32)
    # A sum over the first dimension would take 128 MiB there, for partial sums.
    ones = weight.new_ones(1, len(weight))
    return float32_product(ones, weight)[0]


def weighted_rows(x: Tensor, weights: Tensor) -> Tensor:
    """sum_n weights_n x_n (H,) in float32."""
    total = x.new_zeros(x.shape[1], dtype=torch.float32)
    for start in range(0, x.shape[0], _UPCAST_ROWS):
        part = slice(start, start + _UPCAST_ROWS)
        total += weights[part] @ x[part].float()
    return total

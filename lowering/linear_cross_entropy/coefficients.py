"""How a reduction's weights and normaliser reach the gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from structfly.lowering.linear_cross_entropy.chunked import Linear
from structfly.lowering.linear_cross_entropy.schedule import saved_dtype


def row_coefficients(
    linear: Linear, weight: Tensor | None, count: Tensor, upstream: Tensor | None = None
) -> tuple[Tensor | None, Tensor]:
    """Fold ``upstream / count`` into the coefficients where the dtype has the range for it, else keep them near one.

    Args:
        weight: (N,) weights of the rows' losses in ``linear.accumulation``, or None for ones.
        count: () float64 normaliser.
        upstream: () gradient of the loss, or None for one.

    Returns:
        the coefficients for the row step, None for ones, and the factor left over for the float32 gradients.
    """
    rows = linear.x.shape[0]
    factor = count.reciprocal() if upstream is None else upstream / count
    factor = factor.masked_fill_(count == 0, 0.0)  # no live row: the loss is NaN, the gradients are 0
    factor = factor.to(linear.accumulation)
    one = torch.ones_like(factor)
    if saved_dtype(linear.x.dtype) == linear.x.dtype:
        scaled = factor.expand(rows) if weight is None else weight * factor
        return scaled.contiguous(), one
    if weight is None or rows == 0:
        return None, factor
    largest = weight.abs().amax()
    largest = torch.where(largest > 0, largest, one)
    return weight / largest, factor * largest

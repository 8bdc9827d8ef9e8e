"""How a reduction's weights and normaliser reach the gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from structfly.lowering.linear_cross_entropy.chunked import Linear
from structfly.lowering.linear_cross_entropy.schedule import saved_dtype


def row_coefficients(
    linear: Linear,
    weight: Tensor | None,
    count: Tensor,
    upstream: Tensor | None = None,
    largest: Tensor | float = 1.0,
) -> tuple[Tensor | None, Tensor]:
    """Fold ``upstream / count`` into the coefficients where the dtype has the range for it, else keep them near one.

    Args:
        weight: (N,) weights of the rows' losses in ``linear.accumulation``, or None for ones.
        count: () float64 normaliser.
        upstream: () gradient of the loss, or None for one.
        largest: a number or (), how large a row of coefficient 1 makes the gradient of what the softmax sees.

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
    if rows == 0:
        return None, factor
    if linear.epilogue.has_steepest:  # of a chain without a bound float16 wants no gradient
        largest = largest * linear.epilogue.steepest([operand.to(linear.accumulation) for operand in linear.operands])
    if weight is not None:
        largest = largest * weight.abs().amax()
    if isinstance(largest, float) and largest in (0.0, 1.0):
        return None, factor
    largest = torch.as_tensor(largest, dtype=factor.dtype, device=factor.device)
    largest = torch.where(largest > 0, largest, one)
    return (one if weight is None else weight).expand(rows) / largest, factor * largest

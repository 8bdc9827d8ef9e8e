"""From rows to the loss, and how a reduction's weights and normaliser reach the gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from structfly.lowering.head.chunks import saved_dtype
from structfly.lowering.head.linear import Gradients, Linear, in_dtypes_of


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


def upstream_coefficients(
    linear: Linear,
    reduction: str,
    weight: Tensor | None,
    count: Tensor,
    grad_loss: Tensor,
    largest: Tensor | float = 1.0,
) -> tuple[Tensor | None, Tensor]:
    """:func:`row_coefficients` with the loss's gradient at hand, which without a reduction has one number a row."""
    grad_loss = grad_loss.to(linear.accumulation)
    if reduction == "none":
        return row_coefficients(linear, grad_loss, count, largest=largest)
    return row_coefficients(linear, weight, count, grad_loss, largest)


def reduced(losses: Tensor, reduction: str, weight: Tensor | None, count: Tensor) -> Tensor:
    """``sum_n weight_n losses_n / count``, or the losses (N,) themselves without a reduction.

    A row whose weight is 0 counts as 0 even where its loss is infinite.
    """
    if reduction == "none":
        return losses
    if weight is not None:
        losses = torch.where(weight != 0, losses * weight, 0.0)
    return losses.sum(dtype=torch.float64) / count


def finished(gradients: Gradients, rest: Tensor, inputs: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor]:
    """The gradients, one after another, with the factor left over for them, each in the dtype of its input.

    Args:
        rest: of :func:`row_coefficients`; one unless gradients of ``dtype``, the hidden states', wait in another.
    """
    made = gradients.each
    if saved_dtype(dtype) != dtype:
        made = [gradient.mul_(rest) for gradient in made]
    return in_dtypes_of(inputs, made)

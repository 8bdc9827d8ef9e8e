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
    factor = _factor(linear, count, upstream)
    one = torch.ones_like(factor)
    if saved_dtype(linear.x.dtype) == linear.x.dtype:
        return _over_rows(linear, weight, factor), one
    if rows == 0:
        return None, factor
    largest = largest * _steepest(linear)
    if weight is not None:
        largest = largest * weight.abs().amax()
    if isinstance(largest, float) and largest in (0.0, 1.0):
        return None, factor
    largest = torch.full_like(factor, largest) if isinstance(largest, float) else largest.to(factor.dtype)
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


def statistic_coefficients(
    linear: Linear,
    reduction: str,
    weight: Tensor | None,
    count: Tensor,
    grad_loss: Tensor | None,
    others: Sequence[Tensor | None],
    largest: Tensor | float = 1.0,
) -> tuple[Tensor | None, list[Tensor | None], Tensor]:
    """:func:`upstream_coefficients` where other statistics of the rows have gradients ``others`` of their own.

    Returns:
        the loss's coefficients, those of the other statistics, None for none, and the factor left over for all.
    """
    loss = None
    if grad_loss is not None:
        grad_loss = grad_loss.to(linear.accumulation)
        each = reduction == "none"
        factor = _factor(linear, count, None if each else grad_loss)
        loss = _over_rows(linear, grad_loss if each else weight, factor)
    rest = [None if other is None else other.to(linear.accumulation) for other in others]
    bounds = [] if loss is None else [loss.abs().amax() * largest] if len(loss) else []
    bounds += [other.abs().amax() for other in rest if other is not None and len(other)]
    one = torch.ones((), dtype=linear.accumulation, device=linear.x.device)
    if saved_dtype(linear.x.dtype) == linear.x.dtype or not bounds:
        return loss, rest, one
    bound = torch.stack(bounds).amax() * _steepest(linear)
    bound = torch.where(bound > 0, bound, one)
    return (
        None if loss is None else loss / bound,
        [None if other is None else other / bound for other in rest],
        bound,
    )


def _factor(linear: Linear, count: Tensor, upstream: Tensor | None) -> Tensor:
    """() ``upstream / count``, and 0 where no row counts: the loss is NaN then, the gradients are 0."""
    factor = count.reciprocal() if upstream is None else upstream / count
    return factor.masked_fill_(count == 0, 0.0).to(linear.accumulation)


def _over_rows(linear: Linear, weight: Tensor | None, factor: Tensor) -> Tensor:
    """(N,) ``weight * factor``."""
    return (factor.expand(linear.x.shape[0]) if weight is None else weight * factor).contiguous()


def _steepest(linear: Linear) -> Tensor | float:
    """How much the chain multiplies a gradient by at most; of a chain without a bound float16 wants none."""
    if not linear.epilogue.has_steepest:
        return 1.0
    return linear.epilogue.steepest([operand.to(linear.accumulation) for operand in linear.operands])


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

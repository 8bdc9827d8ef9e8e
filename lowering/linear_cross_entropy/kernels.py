"""What the op does at run time: weigh the rows, run the chunks, reduce."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from structfly.lowering.head.linear import Wanted, allocate_gradients
from structfly.lowering.head.reduction import (
    finished,
    reduced,
    row_coefficients,
    statistic_coefficients,
    upstream_coefficients,
)
from structfly.lowering.linear_cross_entropy.arguments import Arguments, Outputs
from structfly.lowering.linear_cross_entropy.checks import check
from structfly.lowering.linear_cross_entropy.chunked import Made, run_chunks
from structfly.lowering.linear_cross_entropy.exponentials import run_exponentials
from structfly.lowering.linear_cross_entropy.row_program import RowLoss, parse_row_program
from structfly.lowering.linear_cross_entropy.rows import Coefficients, RowStatistics, RowStep
from structfly.lowering.linear_cross_entropy.rows_aten import row_step_aten
from structfly.lowering.linear_cross_entropy.rows_triton import row_step_triton


def _row_step(x: Tensor) -> RowStep:
    return row_step_triton if x.is_cuda and x.dtype != torch.float64 else row_step_aten


def _run(call: Arguments, coefficients: Coefficients | RowLoss, wanted: Wanted | None) -> Made:
    if call.scheme == "exponentials" and isinstance(coefficients, Coefficients):
        losses, gradients = run_exponentials(call.head, coefficients.loss_rows, wanted, call.workspace)
        return Made(RowStatistics(loss=losses), gradients)
    return run_chunks(call.head, coefficients, wanted, call.workspace, _row_step(call.x))


def _weights(call: Arguments) -> tuple[Tensor | None, Tensor]:
    """What makes the reduction: ``loss = sum_n weight_n loss_n / count``; None means ones, the count is float64."""
    dtype = call.head.accumulation
    if call.reduction == "mean" and call.target is not None:
        if call.ignore_index is None and call.class_weight is None:
            return None, torch.full((), len(call.target), dtype=torch.float64, device=call.x.device)
        live = torch.ones_like(call.target) if call.ignore_index is None else call.target != call.ignore_index
        if call.class_weight is not None:
            live = live * call.class_weight.to(dtype)[torch.where(live != 0, call.target, 0)]
        return None, live.sum(dtype=torch.float64)
    weight = None if call.row_weight is None else call.row_weight.to(dtype)
    return weight, torch.ones((), dtype=torch.float64, device=call.x.device)


def _largest_gradient(call: Arguments) -> Tensor | float:
    """How large a row of coefficient 1 makes the gradient of what the softmax sees."""
    return 1.0 if call.class_weight is None else call.class_weight.to(call.head.accumulation).amax()


def _row_loss(call: Arguments) -> RowLoss:
    dtype = call.head.accumulation
    operands = (each if each.dtype == torch.bool else each.to(dtype) for each in call.row_operands)
    return RowLoss(parse_row_program(call.row_loss), tuple(operands))


def _of_loss(coefficient: Tensor | None) -> Coefficients:
    return Coefficients(1.0 if coefficient is None else coefficient)


def forward(*arguments: Any) -> Outputs:
    call = Arguments(*arguments)
    check(call)
    coefficients: Coefficients | RowLoss
    with torch.autocast(call.x.device.type, enabled=False):
        weight, count = _weights(call)
        rest = torch.ones((), dtype=call.head.accumulation, device=call.x.device)
        if call.row_loss:
            coefficients = _row_loss(call)
        elif call.target is None:
            coefficients = Coefficients()
        else:
            coefficient, rest = row_coefficients(call.head, weight, count, largest=_largest_gradient(call))
            coefficients = _of_loss(coefficient)
        found, gradients, row_losses = _run(call, coefficients, call.wanted_in_forward)
        losses = found.loss if row_losses is None else row_losses
        loss = call.x.new_empty(0) if losses is None else reduced(losses, call.reduction, weight, count)
    if gradients is None:
        gradients = allocate_gradients(call.head, Wanted())
    return Outputs._make((loss.to(call.loss_dtype), *_statistics(call, found), rest, *gradients))


def _statistics(call: Arguments, found: RowStatistics) -> list[Tensor]:
    """What is returned of the rows, empty where it was not asked for."""
    given = {"losses": found.loss, **found._asdict()}
    results = []
    for name in ("losses", *RowStatistics._fields[1:]):
        value = given[name] if name in call.named_statistics else None
        dtype = torch.int64 if name == "argmax" else call.head.accumulation
        results.append(call.x.new_empty(0, dtype=dtype) if value is None else value)
    return results


def backward(
    grad_loss: Tensor | None,
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
    grad_chosen: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor | list[Tensor], ...]:
    call = Arguments(*arguments)._replace(statistics="")  # nothing but what the gradients need is made again
    others = (grad_lse, grad_entropy, grad_chosen)
    largest = _largest_gradient(call)
    with torch.autocast(call.x.device.type, enabled=False):
        weight, count = _weights(call)
        if grad_loss is not None and not any(each is not None for each in others):
            coefficient, rest = upstream_coefficients(call.head, call.reduction, weight, count, grad_loss, largest)
            coefficients = _of_loss(coefficient)
        else:
            loss, given, rest = statistic_coefficients(
                call.head, call.reduction, weight, count, grad_loss, others, largest
            )
            coefficients = Coefficients(loss, *given)
        gradients = _run(call, coefficients, call.wanted).gradients
        assert gradients is not None
        made = finished(gradients, rest, call.differentiable, call.x.dtype)
        return *made[:5], made[5:]

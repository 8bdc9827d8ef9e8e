"""What the op does at run time: weigh the rows, run the scheme, reduce."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from structfly.lowering.autocast import without_autocast
from structfly.lowering.head.linear import Wanted, allocate_gradients
from structfly.lowering.head.reduction import finished, statistic_coefficients
from structfly.lowering.linear_cross_entropy.arguments import Arguments, Outputs
from structfly.lowering.linear_cross_entropy.blocks import run_blocks
from structfly.lowering.linear_cross_entropy.checks import check
from structfly.lowering.linear_cross_entropy.chunked import Head, Made, run_chunks
from structfly.lowering.linear_cross_entropy.exponentials import run_exponentials
from structfly.lowering.linear_cross_entropy.pass_records import LateCoefficients
from structfly.lowering.linear_cross_entropy.row_program import RowLoss, parse_row_program
from structfly.lowering.linear_cross_entropy.rows import Coefficients, RowStatistics, RowStep
from structfly.lowering.linear_cross_entropy.rows_aten import row_step_aten
from structfly.lowering.linear_cross_entropy.rows_triton import row_step_triton
from structfly.lowering.linear_cross_entropy.weighing import Weighing


def _row_step(x: Tensor) -> RowStep:
    return row_step_triton if x.is_cuda and x.dtype != torch.float64 else row_step_aten


def _run_generated(call: Arguments, head: Head, rows: Weighing, wanted: Wanted | None) -> Made:
    """The schemes of generated products, which know losses alone."""
    run = {"exponentials": run_exponentials, "blocks": run_blocks}[call.scheme]
    coefficients = LateCoefficients(rows.chosen, rows.late_coefficients)
    losses, gradients = run(head, coefficients, wanted, call.workspace)
    return Made(RowStatistics(loss=losses), gradients)


def _row_loss(call: Arguments, head: Head) -> RowLoss:
    operands = (each if each.dtype == torch.bool else each.to(head.accumulation) for each in call.row_operands)
    return RowLoss(parse_row_program(call.row_loss), tuple(operands), tuple(call.row_group))


def _run_statistics_first(call: Arguments, head: Head, loss: RowLoss, wanted: Wanted | None) -> Made:
    """The loss of groups that are longer than a chunk: their statistics take a pass of their own."""
    row_step = _row_step(call.x)
    found = run_chunks(head, Coefficients(), None, call.workspace, row_step).statistics
    losses, coefficients = loss.differentiate(found)
    gradients = None
    if wanted is not None:
        head = call._replace(statistics="", row_loss="").head  # nothing but what the gradients need is made again
        gradients = run_chunks(head, coefficients, wanted, call.workspace, row_step).gradients
    return Made(found, gradients, losses)


def _of_loss(coefficient: Tensor | None) -> Coefficients:
    return Coefficients(1.0 if coefficient is None else coefficient)


def forward(*arguments: Any) -> Outputs:
    call = Arguments(*arguments)
    check(call)
    head, wanted = call.head, call.wanted_in_forward
    with without_autocast(call.x.device):
        rows = Weighing(call, head)
        if call.scheme != "logits":
            made = _run_generated(call, head, rows, wanted)
        else:
            coefficients: Coefficients | RowLoss = Coefficients()
            if call.row_loss:
                coefficients = _row_loss(call, head)
            elif call.target is not None:
                coefficients = _of_loss(rows.coefficients[0])
            if isinstance(coefficients, RowLoss) and call.statistics_first:
                made = _run_statistics_first(call, head, coefficients, wanted)
            else:
                made = run_chunks(head, coefficients, wanted, call.workspace, _row_step(call.x))
        found, gradients, row_losses = made
        losses = found.loss if row_losses is None else row_losses
        loss = call.x.new_empty(0) if losses is None else rows.reduced(losses)
        if call.row_loss or call.target is None:
            rest = torch.ones((), dtype=head.accumulation, device=call.x.device)
        else:
            rest = rows.coefficients[1]
    if gradients is None:
        gradients = allocate_gradients(head, Wanted())
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
    head, wanted = call.head, call.wanted
    others = (grad_lse, grad_entropy, grad_chosen)
    with without_autocast(call.x.device):
        rows = Weighing(call, head, grad_loss)
        if call.scheme != "logits":
            gradients, rest = _run_generated(call, head, rows, wanted).gradients, rows.coefficients[1]
        else:
            if grad_loss is not None and not any(each is not None for each in others):
                coefficient, rest = rows.coefficients
                coefficients = _of_loss(coefficient)
            else:
                loss, given, rest = statistic_coefficients(
                    head, call.reduction, *rows.weights, grad_loss, others, rows.largest_gradient
                )
                coefficients = Coefficients(loss, *given)
            gradients = run_chunks(head, coefficients, wanted, call.workspace, _row_step(call.x)).gradients
        assert gradients is not None
        made = finished(gradients, rest, call.differentiable, call.x.dtype)
        return *made[:5], made[5:]

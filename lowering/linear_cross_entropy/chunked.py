"""The head in chunks of rows: logits of one chunk exist at a time, overwritten by their own gradient.

Per chunk of R rows: z = x W^T (2RHC operations), the row step makes statistics and dz in place, dx = dz W and
dW += dz^T x (4RHC), so a forward that makes its gradients costs 6NHC in all, the same three products as eager.
The scheme is that of Liger (Hsu et al. 2024) and of torch's chunked op; here the row step, the sums' dtypes and the
chunk length follow :mod:`~structfly.lowering.linear_cross_entropy.schedule`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from structfly.lowering.head.chunks import row_stride, rows_per_chunk
from structfly.lowering.head.gradient_sums import GradientSums
from structfly.lowering.head.linear import Gradients, Linear, Wanted
from structfly.lowering.linear_cross_entropy.rows import (
    ClassTerms,
    Coefficients,
    Indices,
    RowFunction,
    RowStatistics,
    RowStep,
    joined,
)
from structfly.lowering.linear_cross_entropy.schedule import gradient_scale


@dataclass(frozen=True)
class Head(Linear):
    """The inputs of the head.

    ``asked`` names the fields of :class:`~structfly.lowering.linear_cross_entropy.rows.RowStatistics` that are wanted;
    ``target`` is empty where the loss is not among them.
    """

    target: Tensor
    choices: Tensor | None
    class_weight: Tensor | None
    ignore_index: int | None
    label_smoothing: float
    asked: tuple[str, ...]


def class_terms(head: Head, operand_gradients: tuple[bool, ...] = ()) -> ClassTerms:
    """What the rows share, restricted to the live classes, and the operands of all rows."""
    classes = slice(head.num_classes)
    weight = None if head.class_weight is None else head.class_weight.to(head.accumulation)
    conditions = head.epilogue.conditions
    return ClassTerms(
        epilogue=head.epilogue,
        operands=tuple(o if i in conditions else o.to(head.accumulation) for i, o in enumerate(head.operands)),
        operand_gradients=operand_gradients or (False,) * len(head.operands),
        bias=None if head.bias is None else head.bias[classes],
        weight=weight,
        weight_sum=None if weight is None else weight.sum(),
        label_smoothing=head.label_smoothing,
        ignore_index=head.ignore_index,
        gradient_scale=gradient_scale(head.x.dtype),
    )


class Made(NamedTuple):
    """What a pass over all rows makes: what was asked of them, the gradients that were wanted, and the losses of a
    function of the rows, one a group."""

    statistics: RowStatistics
    gradients: Gradients | None
    row_losses: Tensor | None = None


def run_chunks(
    head: Head,
    coefficients: Coefficients | RowFunction,
    wanted: Wanted | None,
    workspace: int,
    row_step: RowStep,
) -> Made:
    """What ``head.asked`` names of all rows and, where ``wanted`` is given, gradients of the sum over rows of the
    statistics times their coefficients.

    Args:
        coefficients: of all N rows, or the function of the rows' statistics that gives them.
        wanted: which gradients; None makes none (2NHC operations).
        workspace: bytes the logits of one chunk may take; a chunk is at least one group of a function.
        row_step: the row step for the device.
    """
    rows, dtype = head.x.shape[0], head.x.dtype
    terms = class_terms(head, () if wanted is None else wanted.operands)
    indices = Indices(head.target if "loss" in head.asked else None, head.choices)
    group = 1 if isinstance(coefficients, Coefficients) else coefficients.group_rows
    length = rows_per_chunk(rows, head.num_classes, dtype, workspace, group)
    sums = None if wanted is None else GradientSums(head, wanted, -(-rows // length), terms.gradient_scale)
    buffer = head.x.new_empty(length, row_stride(head.num_classes))
    statistics: list[RowStatistics] = []
    losses: list[Tensor] = []
    for start in range(0, max(rows, 1), length):  # one chunk where there are no rows, for the statistics' shapes
        part = slice(start, min(start + length, rows))
        logits = buffer[: part.stop - start, : head.num_classes]
        head.multiply(logits, part)
        factors, of_rows = coefficients.rows(part), terms.of_rows(part)
        made = row_step(logits, indices.rows(part), factors, of_rows, head.asked, gradient=sums is not None)
        statistics.append(made.statistics)
        if made.losses is not None:
            losses.append(made.losses)
        if sums is not None and rows:
            sums.add(logits, part, made.operand_sums)
        del logits
    del buffer  # before the gradients are rounded, which takes memory of its own
    gradients = None if sums is None else sums.gradients()
    return Made(joined(statistics), gradients, torch.cat(losses) if losses else None)

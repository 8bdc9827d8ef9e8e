"""The head in chunks of rows: logits of one chunk exist at a time, overwritten by their own gradient.

Per chunk of R rows: z = x W^T (2RHC operations), the row step makes losses and dz in place, dx = dz W and
dW += dz^T x (4RHC), so a forward that makes its gradients costs 6NHC in all, the same three products as eager.
The scheme is that of Liger (Hsu et al. 2024) and of torch's chunked op; here the row step, the sums' dtypes and the
chunk length follow :mod:`~structfly.lowering.linear_cross_entropy.schedule`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from structfly.lowering.head.chunks import row_stride, rows_per_chunk
from structfly.lowering.head.gradient_sums import GradientSums
from structfly.lowering.head.linear import Gradients, Linear, Wanted
from structfly.lowering.linear_cross_entropy.rows import ClassTerms, RowStep
from structfly.lowering.linear_cross_entropy.schedule import gradient_scale


@dataclass(frozen=True)
class Head(Linear):
    """The inputs of the head."""

    target: Tensor
    class_weight: Tensor | None
    ignore_index: int | None
    label_smoothing: float


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


def run_chunks(
    head: Head,
    coefficient: Tensor | None,
    wanted: Wanted | None,
    workspace: int,
    row_step: RowStep,
) -> tuple[Tensor, Gradients | None]:
    """Losses of all rows and, where ``wanted`` is given, gradients of ``sum_n coefficient_n loss_n``.

    Args:
        coefficient: (N,) in ``head.accumulation``, or None for ones.
        wanted: None computes losses alone (2NHC operations).
        workspace: bytes the logits of one chunk may take.
        row_step: the row step for the device.

    Returns:
        (N,) losses in ``head.accumulation`` and the gradients.
    """
    rows, dtype = head.x.shape[0], head.x.dtype
    terms = class_terms(head, () if wanted is None else wanted.operands)
    length = rows_per_chunk(rows, head.num_classes, dtype, workspace)
    losses = torch.empty(rows, dtype=head.accumulation, device=head.x.device)
    sums = None if wanted is None else GradientSums(head, wanted, -(-rows // length), terms.gradient_scale)
    buffer = head.x.new_empty(length, row_stride(head.num_classes))
    for start in range(0, rows, length):
        part = slice(start, min(start + length, rows))
        logits = buffer[: part.stop - start, : head.num_classes]
        head.multiply(logits, part)
        row_coefficient = None if coefficient is None else coefficient[part]
        results = row_step(logits, head.target[part], row_coefficient, terms.of_rows(part), gradient=sums is not None)
        losses[part] = results.losses
        if sums is not None:
            sums.add(logits, part, results.operand_sums)
        del logits
    del buffer  # before the gradients are rounded, which takes memory of its own
    return losses, None if sums is None else sums.gradients()

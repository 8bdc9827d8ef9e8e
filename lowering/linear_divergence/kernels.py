"""What the op does at run time: check, weigh the rows, run the chunks, reduce."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from structfly.errors import StructflyError
from structfly.lowering.autocast import without_autocast
from structfly.lowering.head.epilogue import parse_epilogue
from structfly.lowering.head.linear import Gradients, Wanted, allocate_gradients
from structfly.lowering.head.reduction import finished, reduced, row_coefficients, upstream_coefficients
from structfly.lowering.linear_divergence.arguments import Arguments
from structfly.lowering.linear_divergence.chunked import run_chunks
from structfly.lowering.linear_divergence.rows import KINDS, TEACHER_FORMS, RowStep
from structfly.lowering.linear_divergence.rows_aten import row_step_aten
from structfly.lowering.linear_divergence.rows_triton import row_step_triton


def _row_step(x: Tensor) -> RowStep:
    return row_step_triton if x.is_cuda and x.dtype != torch.float64 else row_step_aten


def _run(call: Arguments, coefficient: Tensor | None, wanted: Wanted | None) -> tuple[Tensor, Gradients | None]:
    teacher, step = call.teacher_rows, _row_step(call.x)
    return run_chunks(call.student, teacher, call.row_terms, coefficient, wanted, call.workspace, step)


def _check(call: Arguments) -> None:
    """Refuse what the schema cannot: unknown names, and combinations with no meaning."""
    allowed = {
        "kind": KINDS,
        "teacher_form": TEACHER_FORMS,
        "reduction": ("none", "sum", "mean"),
        "schedule": ("forward", "backward"),
    }
    for name, names in allowed.items():
        if getattr(call, name) not in names:
            raise StructflyError(f"{name} is {getattr(call, name)!r}; allowed: {', '.join(map(repr, names))}")
    _check_teacher(call)
    _check_epilogues(call)
    if call.kind == "jsd" and not 0.0 < call.beta < 1.0:
        raise StructflyError(
            f"beta is {call.beta} for kind='jsd'; allowed: above 0 and below 1; the ends are 'forward_kl' and "
            "'reverse_kl'"
        )
    if call.label_smoothing and (call.kind != "cross_entropy" or not 0.0 <= call.label_smoothing <= 1.0):
        raise StructflyError(
            f"label_smoothing is {call.label_smoothing} for kind={call.kind!r}; allowed: 0 to 1 for "
            "'cross_entropy', 0 for others"
        )
    if call.schedule == "forward" and call.reduction == "none" and call.wanted.any:
        raise StructflyError("reduction='none' has no scalar upstream gradient; use schedule='backward'")
    if call.row_weight is not None and call.reduction != "sum":
        raise StructflyError(f"row_weight goes with reduction='sum', not {call.reduction!r}")


def _check_teacher(call: Arguments) -> None:
    linear = (call.teacher_x is not None, call.teacher_weight is not None)
    if linear != (call.teacher is None,) * 2:
        raise StructflyError("a teacher is either teacher, or teacher_x and teacher_weight; give one of the two")
    if call.teacher_form != "logits" and (any(linear) or call.teacher_epilogue):
        raise StructflyError(f"teacher_form is {call.teacher_form!r} of a teacher whose logits are given or made")
    if call.teacher_bias is not None and not any(linear):
        raise StructflyError("teacher_bias goes with teacher_x and teacher_weight")
    rows = call.teacher_x if call.teacher is None else call.teacher
    assert rows is not None
    if call.teacher is not None and tuple(call.teacher.shape) != (call.x.shape[0], call.num_classes):
        raise StructflyError(
            f"teacher has shape {tuple(call.teacher.shape)}; allowed: {(call.x.shape[0], int(call.num_classes))}, one "
            "row for each of x and one column for each class"
        )
    if rows.shape[0] != call.x.shape[0]:
        raise StructflyError(f"teacher_x has {rows.shape[0]} rows and x {call.x.shape[0]}; give one for each")
    if (rows.dtype == torch.float64) != (call.x.dtype == torch.float64):
        raise StructflyError(
            f"the teacher is {rows.dtype} and x {call.x.dtype}; allowed: both float64 or neither; cast one of them"
        )


def _check_epilogues(call: Arguments) -> None:
    for name in ("epilogue", "teacher_epilogue"):
        if parse_epilogue(getattr(call, name)).operands:
            raise StructflyError(
                f"{name} is {getattr(call, name)!r}; allowed: steps whose operands are numbers, for a divergence takes "
                "no tensors for them"
            )
    if call.x.dtype == torch.float16 and call.wanted.any and not parse_epilogue(call.epilogue).has_steepest:
        raise StructflyError(
            f"the slope of epilogue {call.epilogue!r} has no bound, and float16 no room for it; use another dtype"
        )


def _weights(call: Arguments) -> tuple[Tensor | None, Tensor]:
    """What makes the reduction: ``loss = sum_n weight_n loss_n / count``; None means ones, the count is float64."""
    weight = None if call.row_weight is None else call.row_weight.to(call.student.accumulation)
    count = call.x.shape[0] if call.reduction == "mean" else 1
    return weight, torch.full((), count, dtype=torch.float64, device=call.x.device)


def forward(*arguments: Any) -> tuple[Tensor, ...]:
    call = Arguments(*arguments)
    _check(call)
    with without_autocast(call.x.device):
        weight, count = _weights(call)
        coefficient, rest = row_coefficients(call.student, weight, count)
        losses, gradients = _run(call, coefficient, call.wanted_in_forward)
        loss = reduced(losses, call.reduction, weight, count)
    if gradients is None:
        gradients = allocate_gradients(call.student, Wanted())
    return loss.to(call.loss_dtype), rest, *gradients.each


def backward(grad_loss: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    call = Arguments(*arguments)
    with without_autocast(call.x.device):
        weight, count = _weights(call)
        coefficient, rest = upstream_coefficients(call.student, call.reduction, weight, count, grad_loss)
        _, gradients = _run(call, coefficient, call.wanted)
        assert gradients is not None
        return tuple(finished(gradients, rest, call.differentiable, call.x.dtype))

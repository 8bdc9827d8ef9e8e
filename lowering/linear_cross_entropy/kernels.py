"""What the op does at run time: check, weigh the rows, run the chunks, reduce."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from structfly.compat import assert_on_device
from structfly.errors import StructflyError
from structfly.lowering.head.epilogue import parse_epilogue
from structfly.lowering.head.linear import DIFFERENTIABLE, Gradients, Wanted, allocate_gradients
from structfly.lowering.head.reduction import finished, reduced, row_coefficients, upstream_coefficients
from structfly.lowering.linear_cross_entropy.arguments import Arguments
from structfly.lowering.linear_cross_entropy.chunked import run_chunks
from structfly.lowering.linear_cross_entropy.exponentials import run_exponentials
from structfly.lowering.linear_cross_entropy.rows import RowStep
from structfly.lowering.linear_cross_entropy.rows_aten import row_step_aten
from structfly.lowering.linear_cross_entropy.rows_triton import row_step_triton
from structfly.lowering.linear_cross_entropy.schedule import why_no_exponentials


def _row_step(x: Tensor) -> RowStep:
    return row_step_triton if x.is_cuda and x.dtype != torch.float64 else row_step_aten


def _run(call: Arguments, coefficient: Tensor | None, wanted: Wanted | None) -> tuple[Tensor, Gradients | None]:
    if call.scheme == "exponentials":
        return run_exponentials(call.head, coefficient, wanted, call.workspace)
    return run_chunks(call.head, coefficient, wanted, call.workspace, _row_step(call.x))


def _check(call: Arguments) -> None:
    """Refuse what the schema cannot: a target out of range as torch refuses it, combinations with no meaning."""
    if call.reduction not in ("none", "sum", "mean"):
        raise StructflyError(f"reduction is {call.reduction!r}; allowed: 'none', 'sum', 'mean'")
    if call.schedule not in ("forward", "backward"):
        raise StructflyError(f"schedule is {call.schedule!r}; allowed: 'forward', 'backward'")
    if call.scheme not in ("logits", "exponentials"):
        raise StructflyError(f"scheme is {call.scheme!r}; allowed: 'logits', 'exponentials'")
    unserved = "" if call.scheme == "logits" else _why_no_exponentials(call)
    if unserved:
        raise StructflyError(f"the scheme 'exponentials' does not serve this head: {unserved}; use 'logits'")
    if call.schedule == "forward" and call.reduction == "none" and call.wanted.any:
        raise StructflyError("reduction='none' has no scalar upstream gradient; use schedule='backward'")
    _check_operands(call)
    if call.row_weight is not None and call.reduction != "sum":
        raise StructflyError(f"row_weight goes with reduction='sum', not {call.reduction!r}")
    target = call.target
    if target.is_cuda and call.scheme == "exponentials":
        return  # which looks at every target anyway
    wrong = (target < 0) | (target >= call.num_classes)
    if call.ignore_index is not None:
        wrong &= target != call.ignore_index
    if target.is_cuda:
        assert_on_device(~wrong.any(), f"a target is out of bounds for {call.num_classes} classes")
    elif bool(wrong.any()):
        raise IndexError(f"Target {int(target[wrong][0])} is out of bounds.")


def _check_operands(call: Arguments) -> None:
    """Refuse operands that are not what the epilogue says, or gradients that are not one each."""
    epilogue, operands = parse_epilogue(call.epilogue), call.operands
    if len(operands) != len(epilogue.operands) or len(call.gradients) != len(call.differentiable):
        raise StructflyError(
            f"{len(operands)} operands and {len(call.gradients)} flags of gradients; the epilogue {call.epilogue!r} "
            f"takes {len(epilogue.operands)} operands, which with {', '.join(DIFFERENTIABLE)} have a flag each"
        )
    if call.x.dtype == torch.float16 and call.wanted.any and not epilogue.has_steepest:
        raise StructflyError(
            f"the slope of epilogue {call.epilogue!r} has no bound, and float16 no room for it; use another dtype"
        )
    shapes = {"scalar": (), "row": call.target.shape, "class": (call.num_classes,)}
    for operand, tensor in zip(epilogue.operands, operands, strict=True):
        condition = operand.index in epilogue.conditions
        fits = tensor.dtype == torch.bool if condition else tensor.is_floating_point()
        if tensor.shape != shapes[operand.kind] or not fits:
            raise StructflyError(
                f"operand {operand} of epilogue {call.epilogue!r} has shape {tuple(tensor.shape)} and {tensor.dtype}; "
                f"it takes {tuple(shapes[operand.kind])} and {'torch.bool' if condition else 'a floating-point dtype'}"
            )


def _why_no_exponentials(call: Arguments) -> str:
    return why_no_exponentials(
        call.x.dtype,
        call.x.shape[1],
        parse_epilogue(call.epilogue),
        label_smoothing=call.label_smoothing,
        adapter=call.adapter_x is not None,
        bias_gradient=call.wanted.bias,
    )


def _weights(call: Arguments) -> tuple[Tensor | None, Tensor]:
    """What makes the reduction: ``loss = sum_n weight_n loss_n / count``; None means ones, the count is float64."""
    dtype = call.head.accumulation
    if call.reduction == "mean":
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


def forward(*arguments: Any) -> tuple[Tensor | list[Tensor], ...]:
    call = Arguments(*arguments)
    _check(call)
    with torch.autocast(call.x.device.type, enabled=False):
        weight, count = _weights(call)
        coefficient, rest = row_coefficients(call.head, weight, count, largest=_largest_gradient(call))
        losses, gradients = _run(call, coefficient, call.wanted_in_forward)
        loss = reduced(losses, call.reduction, weight, count)
    if gradients is None:
        gradients = allocate_gradients(call.head, Wanted())
    return loss.to(call.loss_dtype), rest, *gradients


def backward(grad_loss: Tensor, *arguments: Any) -> tuple[Tensor | list[Tensor], ...]:
    call = Arguments(*arguments)
    with torch.autocast(call.x.device.type, enabled=False):
        weight, count = _weights(call)
        largest = _largest_gradient(call)
        coefficient, rest = upstream_coefficients(call.head, call.reduction, weight, count, grad_loss, largest)
        _, gradients = _run(call, coefficient, call.wanted)
        assert gradients is not None
        made = finished(gradients, rest, call.differentiable, call.x.dtype)
        return *made[:5], made[5:]

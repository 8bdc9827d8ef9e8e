"""What the op does at run time: check, weigh the rows, run the chunks, reduce."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from structfly.compat import assert_on_device
from structfly.errors import StructflyError
from structfly.lowering.linear_cross_entropy.arguments import Arguments
from structfly.lowering.linear_cross_entropy.chunked import Gradients, Wanted, allocate_gradients, run_chunks
from structfly.lowering.linear_cross_entropy.coefficients import row_coefficients
from structfly.lowering.linear_cross_entropy.epilogue import parse_epilogue
from structfly.lowering.linear_cross_entropy.exponentials import run_exponentials
from structfly.lowering.linear_cross_entropy.rows import RowStep
from structfly.lowering.linear_cross_entropy.rows_aten import row_step_aten
from structfly.lowering.linear_cross_entropy.rows_triton import row_step_triton
from structfly.lowering.linear_cross_entropy.schedule import saved_dtype, why_no_exponentials


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
    if call.schedule == "forward" and call.reduction == "none" and any(call.gradients):
        raise StructflyError("reduction='none' has no scalar upstream gradient; use schedule='backward'")
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


def _why_no_exponentials(call: Arguments) -> str:
    return why_no_exponentials(
        call.x.dtype,
        call.x.shape[1],
        label_smoothing=call.label_smoothing,
        linear=call.class_mask is None and parse_epilogue(call.epilogue).linear,
        adapter=call.adapter_x is not None,
        bias_gradient=Wanted(*call.gradients).bias,
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


def forward(*arguments: Any) -> tuple[Tensor, ...]:
    call = Arguments(*arguments)
    _check(call)
    head = call.head
    with torch.autocast(call.x.device.type, enabled=False):
        weight, count = _weights(call)
        wanted = call.wanted_in_forward
        coefficient, rest = row_coefficients(head, weight, count)
        losses, gradients = _run(call, coefficient, wanted)
        if call.reduction == "none":
            loss = losses
        else:
            if weight is not None:
                losses = torch.where(weight != 0, losses * weight, 0.0)
            loss = losses.sum(dtype=torch.float64) / count
    if gradients is None:
        gradients = allocate_gradients(head, Wanted(False, False, False, False, False))
    return loss.to(call.loss_dtype), rest, *gradients


def backward(grad_loss: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    call = Arguments(*arguments)
    head, wanted = call.head, Wanted(*call.gradients)
    with torch.autocast(call.x.device.type, enabled=False):
        weight, count = _weights(call)
        grad_loss = grad_loss.to(head.accumulation)
        if call.reduction == "none":
            coefficient, rest = row_coefficients(head, grad_loss, count)
        else:
            coefficient, rest = row_coefficients(head, weight, count, grad_loss)
        _, gradients = _run(call, coefficient, wanted)
        assert gradients is not None
        if saved_dtype(call.x.dtype) == call.x.dtype:
            return tuple(gradients)
        inputs = (call.x, call.weight, call.bias, call.adapter_x, call.adapter_weight)
        return tuple(
            gradient if tensor is None else gradient.mul_(rest).to(tensor.dtype)
            for gradient, tensor in zip(gradients, inputs, strict=True)
        )

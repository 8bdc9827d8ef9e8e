"""What the op does at run time: check, weigh the rows, run the chunks, reduce."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from structfly.compat import assert_on_device
from structfly.errors import StructflyError
from structfly.lowering.head.epilogue import parse_epilogue
from structfly.lowering.head.linear import DIFFERENTIABLE, Gradients, Wanted, allocate_gradients
from structfly.lowering.head.reduction import finished, reduced, row_coefficients, upstream_coefficients
from structfly.lowering.linear_cross_entropy.arguments import Arguments
from structfly.lowering.linear_cross_entropy.blocks import run_blocks
from structfly.lowering.linear_cross_entropy.chunked import run_chunks
from structfly.lowering.linear_cross_entropy.exponentials import run_exponentials
from structfly.lowering.linear_cross_entropy.row_pass import Coefficients
from structfly.lowering.linear_cross_entropy.rows import RowStep
from structfly.lowering.linear_cross_entropy.rows_aten import row_step_aten
from structfly.lowering.linear_cross_entropy.rows_triton import row_step_triton
from structfly.lowering.linear_cross_entropy.schedule import why_no_exponentials


def _row_step(x: Tensor) -> RowStep:
    return row_step_triton if x.is_cuda and x.dtype != torch.float64 else row_step_aten


def _run(call: Arguments, rows: _Weighing, wanted: Wanted | None) -> tuple[Tensor, Gradients | None]:
    if call.scheme != "logits":
        run = {"exponentials": run_exponentials, "blocks": run_blocks}[call.scheme]
        return run(call.head, Coefficients(rows.chosen, rows.coefficient), wanted, call.workspace)
    return run_chunks(call.head, rows.coefficients[0], wanted, call.workspace, _row_step(call.x))


def _check(call: Arguments) -> None:
    """Refuse what the schema cannot: a target out of range as torch refuses it, combinations with no meaning."""
    if call.reduction not in ("none", "sum", "mean"):
        raise StructflyError(f"reduction is {call.reduction!r}; allowed: 'none', 'sum', 'mean'")
    if call.schedule not in ("forward", "backward"):
        raise StructflyError(f"schedule is {call.schedule!r}; allowed: 'forward', 'backward'")
    if call.scheme not in ("logits", "exponentials", "blocks"):
        raise StructflyError(f"scheme is {call.scheme!r}; allowed: 'logits', 'exponentials', 'blocks'")
    unserved = "" if call.scheme == "logits" else _why_no_exponentials(call)
    if unserved:
        raise StructflyError(f"the scheme {call.scheme!r} does not serve this head: {unserved}; use 'logits'")
    if call.schedule == "forward" and call.reduction == "none" and call.wanted.any:
        raise StructflyError("reduction='none' has no scalar upstream gradient; use schedule='backward'")
    _check_operands(call)
    if call.row_weight is not None and call.reduction != "sum":
        raise StructflyError(f"row_weight goes with reduction='sum', not {call.reduction!r}")
    target = call.target
    if target.is_cuda and call.scheme != "logits":
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


class _Weighing:
    """What the reduction, and the gradient of its result, make of the rows' losses.

    It is computed when it is asked for, which is after the first product is launched where the scheme allows.
    """

    def __init__(self, call: Arguments, grad_loss: Tensor | None = None) -> None:
        self._call, self._head, self._grad_loss = call, call.head, grad_loss
        self._count: Tensor | None = None  # of the rows that are not ignored, where it is known

    @cached_property
    def weights(self) -> tuple[Tensor | None, Tensor]:
        """``loss = sum_n weight_n loss_n / count``; None means ones, the count is float64."""
        call, dtype = self._call, self._head.accumulation
        if call.reduction == "mean":
            if call.class_weight is None and self._count is not None:
                return None, self._count.double()
            if call.class_weight is None and call.ignore_index is None:
                return None, torch.full((), len(call.target), dtype=torch.float64, device=call.x.device)
            live = torch.ones_like(call.target) if call.ignore_index is None else call.target != call.ignore_index
            if call.class_weight is not None:
                live = live * call.class_weight.to(dtype)[torch.where(live != 0, call.target, 0)]
            return None, live.sum(dtype=torch.float64)
        weight = None if call.row_weight is None else call.row_weight.to(dtype)
        return weight, torch.ones((), dtype=torch.float64, device=call.x.device)

    @cached_property
    def coefficients(self) -> tuple[Tensor | None, Tensor]:
        """What the row step takes, None for ones, and what is left over for the gradients."""
        (weight, count), head = self.weights, self._head
        # How large a row of coefficient 1 makes the gradient of what the softmax sees.
        class_weight = self._call.class_weight
        largest = 1.0 if class_weight is None else class_weight.to(head.accumulation).amax()
        if self._grad_loss is None:
            return row_coefficients(head, weight, count, largest=largest)
        return upstream_coefficients(head, self._call.reduction, weight, count, self._grad_loss, largest)

    def coefficient(self, count: Tensor) -> Tensor:
        """The first of them, for bfloat16, which has the range for all of it; ``count`` rows are not ignored."""
        self._count = count
        coefficient, _ = self.coefficients
        assert coefficient is not None
        return coefficient

    @property
    def chosen(self) -> Tensor | None:
        """(N,) of which an entry of 0 leaves a row out, or None."""
        return self._grad_loss if self._call.reduction == "none" else self._call.row_weight

    def reduced(self, losses: Tensor) -> Tensor:
        """The loss, in the accumulation's dtype or float64."""
        return reduced(losses, self._call.reduction, *self.weights)


def forward(*arguments: Any) -> tuple[Tensor | list[Tensor], ...]:
    call = Arguments(*arguments)
    _check(call)
    with torch.autocast(call.x.device.type, enabled=False):
        rows = _Weighing(call)
        losses, gradients = _run(call, rows, call.wanted_in_forward)
        loss, rest = rows.reduced(losses), rows.coefficients[1]
    if gradients is None:
        gradients = allocate_gradients(call.head, Wanted())
    return loss.to(call.loss_dtype), rest, *gradients


def backward(grad_loss: Tensor, *arguments: Any) -> tuple[Tensor | list[Tensor], ...]:
    call = Arguments(*arguments)
    with torch.autocast(call.x.device.type, enabled=False):
        rows = _Weighing(call, grad_loss)
        _, gradients = _run(call, rows, call.wanted)
        assert gradients is not None
        made = finished(gradients, rows.coefficients[1], call.differentiable, call.x.dtype)
        return *made[:5], made[5:]

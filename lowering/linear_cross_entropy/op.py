"""``structfly::linear_cross_entropy_v1``: schema, fake, autograd, autocast, vmap and FLOP count of the loss head.

The name carries an ABI version: it goes up with any change of the schema, of the fake or of the autograd formula, so
that a compile cache filled by another version is never served.  Every decision that changes what runs (epilogue,
schedule, workspace, which gradients) is an argument, for the same reason.  Row counts are read at run time.

Two schedules:

* ``"forward"``: a scalar loss whose gradients are made in the forward pass, 6NHC operations.  Backward multiplies
  them by the upstream factor.
* ``"backward"``: the forward makes losses only and backward makes the logits again, 8NHC.  It serves
  ``reduction="none"``, and checkpointed regions, where a forward runs twice and gradients made there would be thrown
  away.  It saves the inputs and nothing else: a chunk holds whole rows, so their normaliser is at hand when needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from structfly.errors import StructflyError, UnsupportedError
from structfly.lowering.linear_cross_entropy import kernels
from structfly.lowering.linear_cross_entropy.arguments import (
    ARGUMENTS,
    BACKWARD_NAME,
    DEVICES,
    DIFFERENTIABLE,
    GRADIENTS,
    NAME,
    Arguments,
)
from structfly.lowering.linear_cross_entropy.chunked import Wanted, allocate_gradients

torch.library.define(NAME, f"({ARGUMENTS}) -> (Tensor loss, Tensor factor, {GRADIENTS})")
torch.library.define(BACKWARD_NAME, f"(Tensor grad_loss, {ARGUMENTS}) -> ({GRADIENTS})")
torch.library.impl(NAME, DEVICES)(kernels.forward)
torch.library.impl(BACKWARD_NAME, DEVICES)(kernels.backward)


def linear_cross_entropy(*arguments: Any) -> tuple[Tensor, ...]:
    """Call the op; see :class:`Arguments`.  Returns the loss, the deferred factor, and the gradients made so far."""
    result: tuple[Tensor, ...] = torch.ops.structfly.linear_cross_entropy_v1.default(*arguments)
    return result


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    call = Arguments(*arguments)
    shape = call.target.shape if call.reduction == "none" else ()
    wanted = call.wanted_in_forward or Wanted(False, False, False, False, False)
    factor = call.x.new_empty((), dtype=call.head.accumulation)
    return call.x.new_empty(shape, dtype=call.loss_dtype), factor, *allocate_gradients(call.head, wanted)


def _backward_fake(grad_loss: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    call = Arguments(*arguments)
    head, wanted = call.head, Wanted(*call.gradients)
    inputs = (call.x, call.weight, call.bias, call.adapter_x, call.adapter_weight)
    return tuple(
        gradient if tensor is None else gradient.to(tensor.dtype)
        for gradient, tensor in zip(allocate_gradients(head, wanted), inputs, strict=True)
    )


torch.library.register_fake(NAME, _forward_fake)
torch.library.register_fake(BACKWARD_NAME, _backward_fake)


# ---------------------------------------------------------------------------------------------------- autograd
#
# With L = factor * sum_n c_n l_n and upstream g, schedule "forward" has G = sum_n c_n dl_n/dtheta (or that times the
# factor, where the dtype allows), so dL/dtheta = (g * rest) * G.  Schedule "backward" hands g to the second op.


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call = Arguments(*inputs)
    ctx.set_materialize_grads(False)
    ctx.schedule, ctx.gradients = call.schedule, tuple(call.gradients)
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (getattr(call, n) for n in DIFFERENTIABLE)]
    if call.schedule == "forward":
        sources = (getattr(call, name) for name in DIFFERENTIABLE)
        ctx.save_for_backward(*output[1:], *(source for source in sources if source is not None))
        return
    ctx.tensor_positions = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
    ctx.arguments = [None if isinstance(value, Tensor) else value for value in inputs]
    ctx.save_for_backward(*(inputs[i] for i in ctx.tensor_positions))


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * len(Arguments._fields)
    positions = [Arguments._fields.index(name) for name in DIFFERENTIABLE]
    for position, name, made in zip(positions, DIFFERENTIABLE, ctx.gradients, strict=True):
        if ctx.needs_input_grad[position] and not made:
            raise StructflyError(
                f"a gradient of {name!r} is asked for, but the call's gradients={list(ctx.gradients)} left it out; "
                f"set its entry to True (order: {', '.join(DIFFERENTIABLE)})"
            )
    if ctx.schedule == "forward":
        factor, *saved = ctx.saved_tensors
        gradients, sources = saved[: len(DIFFERENTIABLE)], tuple(saved[len(DIFFERENTIABLE) :])
        scale = grad_loss.to(factor.dtype) * factor
        made = [_scaled(gradient, scale, dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)]
    else:
        arguments = list(ctx.arguments)
        for position, tensor in zip(ctx.tensor_positions, ctx.saved_tensors, strict=True):
            arguments[position] = tensor
        with torch.no_grad():
            made = list(torch.ops.structfly.linear_cross_entropy_backward_v1.default(grad_loss, *arguments))
        sources = tuple(arguments[position] for position in positions if arguments[position] is not None)
    kept = [gradient if want else None for gradient, want in zip(made, ctx.gradients, strict=True)]
    if torch.is_grad_enabled():  # create_graph=True: a second differentiation must fail, not find zeros
        kept = _refuse_second_derivative(kept, sources)
    result: list[Tensor | None] = [None] * len(Arguments._fields)
    for position, gradient in zip(positions, kept, strict=True):
        result[position] = gradient
    return tuple(result)


def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype | None) -> Tensor:
    """``scale * gradient`` rounded once; a 0-d factor alone would be rounded to the gradient's dtype first."""
    return gradient if dtype is None else (gradient.to(scale.dtype) * scale).to(dtype)


class _SecondDerivative(torch.autograd.Function):
    """Identity whose backward raises."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:
        ctx.count = len(sources)
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise UnsupportedError(
            "structfly's linear_cross_entropy was differentiated twice, which it does not support; compute this loss "
            "outside torch.compile, or switch the rule off with options={'rules': {'linear_cross_entropy': False}}"
        )


def _refuse_second_derivative(gradients: list[Tensor | None], sources: Sequence[Tensor]) -> list[Tensor | None]:
    apply: Any = _SecondDerivative.apply
    return [None if gradient is None else apply(gradient, *sources) for gradient in gradients]


torch.library.register_autograd(NAME, _backward, setup_context=_setup_context)

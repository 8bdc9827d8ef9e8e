"""The autograd formula of the ops that make their gradients in the forward pass, or leave them to a second op.

With L = factor * sum_n c_n l_n and upstream g, schedule "forward" has G = sum_n c_n dl_n/dtheta (or that times the
factor, where the dtype allows), so dL/dtheta = (g * rest) * G.  Schedule "backward" hands g to the second op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from structfly.errors import StructflyError, UnsupportedError


@dataclass(frozen=True)
class HeadAutograd:
    """The formula for one op, whose outputs are the loss, the factor and one gradient for each of ``differentiable``.

    Attributes:
        rule: what the op is called in messages: the name of the rule that writes it.
        arguments: the op's arguments, a named tuple with ``schedule`` and ``gradients``.
        differentiable: the arguments that have gradients, in the order of ``gradients``.
        backward_op: takes the upstream gradient and the op's arguments, returns the gradients.
    """

    rule: str
    arguments: Any
    differentiable: Sequence[str]
    backward_op: Callable[..., tuple[Tensor, ...]]

    def register(self, name: str) -> None:
        """Make it the formula of the op ``name``."""
        torch.library.register_autograd(name, self._backward, setup_context=self._setup_context)

    def _setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call = self.arguments(*inputs)
        sources = [getattr(call, name) for name in self.differentiable]
        ctx.set_materialize_grads(False)
        ctx.schedule, ctx.gradients = call.schedule, tuple(call.gradients)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in sources]
        if call.schedule == "forward":
            ctx.save_for_backward(*output[1:], *(source for source in sources if source is not None))
            return
        ctx.tensor_positions = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
        ctx.arguments = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.save_for_backward(*(inputs[i] for i in ctx.tensor_positions))

    def _backward(self, ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        fields = self.arguments._fields
        result: list[Tensor | None] = [None] * len(fields)
        if grad_loss is None:
            return tuple(result)
        positions = [fields.index(name) for name in self.differentiable]
        for position, name, made in zip(positions, self.differentiable, ctx.gradients, strict=True):
            if ctx.needs_input_grad[position] and not made:
                raise StructflyError(
                    f"a gradient of {name!r} is asked for, but the call's gradients={list(ctx.gradients)} left it out; "
                    f"set its entry to True (order: {', '.join(self.differentiable)})"
                )
        if ctx.schedule == "forward":
            factor, *saved = ctx.saved_tensors
            gradients, sources = saved[: len(positions)], tuple(saved[len(positions) :])
            scale = grad_loss.to(factor.dtype) * factor
            made = [_scaled(gradient, scale, dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)]
        else:
            arguments = list(ctx.arguments)
            for position, tensor in zip(ctx.tensor_positions, ctx.saved_tensors, strict=True):
                arguments[position] = tensor
            with torch.no_grad():
                made = list(self.backward_op(grad_loss, *arguments))
            sources = tuple(arguments[position] for position in positions if arguments[position] is not None)
        kept = [gradient if want else None for gradient, want in zip(made, ctx.gradients, strict=True)]
        if torch.is_grad_enabled():  # create_graph=True: a second differentiation must fail, not find zeros
            kept = self._refuse_second_derivative(kept, sources)
        for position, gradient in zip(positions, kept, strict=True):
            result[position] = gradient
        return tuple(result)

    def _refuse_second_derivative(
        self, gradients: list[Tensor | None], sources: Sequence[Tensor]
    ) -> list[Tensor | None]:
        apply: Any = _SecondDerivative.apply
        return [None if gradient is None else apply(self.rule, gradient, *sources) for gradient in gradients]


def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype | None) -> Tensor:
    """``scale * gradient`` rounded once; a 0-d factor alone would be rounded to the gradient's dtype first."""
    return gradient if dtype is None else (gradient.to(scale.dtype) * scale).to(dtype)


class _SecondDerivative(torch.autograd.Function):
    """Identity whose backward raises."""

    @staticmethod
    def forward(ctx: Any, rule: str, gradient: Tensor, *sources: Tensor) -> Tensor:
        ctx.rule = rule
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise UnsupportedError(
            f"structfly's {ctx.rule} was differentiated twice, which it does not support; compute this loss "
            f"outside torch.compile, or switch the rule off with options={{'rules': {{{ctx.rule!r}: False}}}}"
        )

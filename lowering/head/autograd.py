"""The autograd formula of the ops that make their gradients in the forward pass, or leave them to a second op.

With L = factor * sum_n c_n l_n and upstream g, schedule "forward" has G = sum_n c_n dl_n/dtheta (or that times the
factor, where the dtype allows), so dL/dtheta = (g * rest) * G.  Schedule "backward" hands g, and what is upstream of
other statistics of the rows, to the second op.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from structfly.errors import StructflyError
from structfly.lowering.second_derivative import refuse_second_derivative


@dataclass(frozen=True)
class HeadAutograd:
    """The formula for one op, whose outputs are the loss, ``statistics``, the factor, one gradient for each of
    ``differentiable`` and, where there is ``listed``, a list of the gradients of its tensors.

    Attributes:
        rule: what the op is called in messages: the name of the rule that writes it.
        arguments: the op's arguments, a named tuple with ``schedule``, ``gradients`` and, where there are
            ``statistics``, ``named_statistics``, the names of those that are not empty.
        differentiable: the arguments that have gradients, in the order of ``gradients``.
        backward_op: takes the upstream gradients and the op's arguments, returns the gradients.
        listed: an argument that is a list of tensors, each of which has a gradient after those, or "".
        constants: an argument that is a list of tensors without gradients, or "".
        statistics: further outputs, by name, and whether schedule "backward" can differentiate each: the second op
            then takes its upstream gradient, or None, after the loss's.
    """

    rule: str
    arguments: Any
    differentiable: Sequence[str]
    backward_op: Callable[..., tuple[Any, ...]]
    listed: str = ""
    constants: str = ""
    statistics: Mapping[str, bool] = field(default_factory=dict)

    def register(self, name: str) -> None:
        """Make it the formula of the op ``name``."""
        torch.library.register_autograd(name, self._backward, setup_context=self._setup_context)

    def _setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        call = self.arguments(*inputs)
        sources = self._in_order(call)
        ctx.set_materialize_grads(False)
        ctx.schedule, ctx.gradients = call.schedule, tuple(call.gradients)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in sources]
        ctx.constants = len(getattr(call, self.constants)) if self.constants else 0
        ctx.empty = [name for name, value in call._asdict().items() if isinstance(value, (list, tuple)) and not value]
        if self.statistics:
            kept = set(call.named_statistics) if call.schedule == "backward" else set()
            beside = zip(self.statistics.items(), output[1:], strict=False)
            ctx.mark_non_differentiable(*(value for (name, can), value in beside if not can or name not in kept))
        if call.schedule == "forward":
            factor, *made = output[1 + len(self.statistics) :]
            ctx.save_for_backward(factor, *self._one_by_one(made), *(s for s in sources if s is not None))
            return
        ctx.tensor_positions = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
        listed = getattr(call, self.listed) if self.listed else ()
        arguments = call._replace(**{self.listed: None}) if self.listed else call
        ctx.arguments = [None if isinstance(value, Tensor) else value for value in arguments]
        ctx.save_for_backward(*(inputs[i] for i in ctx.tensor_positions), *listed)

    def _backward(self, ctx: Any, grad_loss: Tensor | None, *others: Any) -> tuple[Any, ...]:
        beside = zip(self.statistics.values(), others, strict=False)
        upstream = [grad_loss, *(gradient for differentiated, gradient in beside if differentiated)]
        if all(gradient is None for gradient in upstream):
            return self._by_argument(ctx, [None] * len(ctx.gradients))
        count = len(self.differentiable)
        names = [*self.differentiable, *(f"{self.listed}[{i}]" for i in range(len(ctx.gradients) - count))]
        needed = self._in_order(self.arguments(*ctx.needs_input_grad))
        for name, need, made in zip(names, needed, ctx.gradients, strict=True):
            if need and not made:
                raise StructflyError(
                    f"a gradient of {name!r} is asked for, but the call's gradients={list(ctx.gradients)} left it out; "
                    f"set its entry to True (order: {', '.join(names)})"
                )
        saved = ctx.saved_tensors  # unpacked once, as checkpoints demand
        if ctx.schedule == "forward":
            assert grad_loss is not None  # nothing else has a gradient in this schedule
            factor, *saved = saved
            gradients, sources = saved[: len(names)], tuple(saved[len(names) :])
            scale = grad_loss.to(factor.dtype) * factor
            made = [_scaled(gradient, scale, dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)]
        else:
            call = self._restored(ctx, saved)
            with torch.no_grad():
                made = self._one_by_one(self.backward_op(*upstream, *call))
            sources = tuple(tensor for tensor in self._in_order(call) if tensor is not None)
        kept = [gradient if want else None for gradient, want in zip(made, ctx.gradients, strict=True)]
        if torch.is_grad_enabled():  # create_graph=True: a second differentiation must fail, not find zeros
            kept = refuse_second_derivative(kept, sources, self._refusal)
        return self._by_argument(ctx, kept)

    def _restored(self, ctx: Any, saved: Sequence[Tensor]) -> Any:
        """The op's arguments, of which schedule "backward" saved the tensors."""
        arguments, count = list(ctx.arguments), len(ctx.tensor_positions)
        for position, tensor in zip(ctx.tensor_positions, saved[:count], strict=True):
            arguments[position] = tensor
        call = self.arguments(*arguments)
        return call._replace(**{self.listed: list(saved[count:])}) if self.listed else call

    def _in_order(self, by_argument: Any) -> list[Any]:
        """What the arguments that have gradients have, the listed ones one by one, in the order of ``gradients``."""
        listed = getattr(by_argument, self.listed) if self.listed else ()
        return [*(getattr(by_argument, name) for name in self.differentiable), *listed]

    def _by_argument(self, ctx: Any, in_order: list[Tensor | None]) -> tuple[Any, ...]:
        """The inverse: one entry for each argument, None for those without a gradient."""
        entries: dict[str, Any] = dict.fromkeys(self.arguments._fields)
        count = len(self.differentiable)
        entries.update(zip(self.differentiable, in_order[:count], strict=True))
        if self.listed:
            entries[self.listed] = in_order[count:]
        if self.constants:
            entries[self.constants] = [None] * ctx.constants
        entries.update((name, []) for name in ctx.empty)  # torch takes any empty list for one of tensors
        return tuple(entries.values())

    def _one_by_one(self, made: Sequence[Any]) -> list[Tensor]:
        """Gradients as an op returns them, without the list."""
        return [*made[:-1], *made[-1]] if self.listed else list(made)

    @property
    def _refusal(self) -> str:
        """What differentiating twice is answered with."""
        return (
            f"structfly's {self.rule} was differentiated twice, which it does not support; compute this loss "
            f"outside torch.compile, or switch the rule off with options={{'rules': {{{self.rule!r}: False}}}}"
        )


def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype | None) -> Tensor:
    """``scale * gradient`` rounded once; a 0-d factor alone would be rounded to the gradient's dtype first."""
    return gradient if dtype is None else (gradient.to(scale.dtype) * scale).to(dtype)

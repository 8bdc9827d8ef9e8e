"""``structfly::linear_divergence_v1``: schema, fake, autograd, autocast, vmap and FLOP count of the divergence head.

The name carries an ABI version: it goes up with any change of the schema, of the fake or of the autograd formula, so
that a compile cache filled by another version is never served.  Every decision that changes what runs (kind, epilogues,
schedule, workspace, which gradients) is an argument, for the same reason.  Row counts are read at run time.

The two schedules are those of :mod:`structfly.lowering.linear_cross_entropy.op`: gradients made in the forward pass,
6NHC + 2NGC operations, or recomputed in backward, 8NHC + 4NGC, for C classes, H hidden units of the student and G of a
teacher whose head is part of the op (0 for one that is given).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from structfly.lowering.head.autograd import HeadAutograd
from structfly.lowering.head.linear import DEVICES, DIFFERENTIABLE, GRADIENTS, Wanted, allocate_gradients, in_dtypes_of
from structfly.lowering.linear_divergence import kernels
from structfly.lowering.linear_divergence.arguments import ARGUMENTS, BACKWARD_NAME, NAME, Arguments
from structfly.lowering.replay.replayed import replayed

torch.library.define(NAME, f"({ARGUMENTS}) -> (Tensor loss, Tensor factor, {GRADIENTS})")
torch.library.define(BACKWARD_NAME, f"(Tensor grad_loss, {ARGUMENTS}) -> ({GRADIENTS})")
torch.library.impl(NAME, DEVICES)(replayed(kernels.forward))
torch.library.impl(BACKWARD_NAME, DEVICES)(replayed(kernels.backward))


def linear_divergence(*arguments: Any) -> tuple[Tensor, ...]:
    """Call the op; see :class:`Arguments`.  Returns the loss, the deferred factor, and the gradients made so far."""
    result: tuple[Tensor, ...] = torch.ops.structfly.linear_divergence_v1.default(*arguments)
    return result


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    call = Arguments(*arguments)
    shape = call.x.shape[:1] if call.reduction == "none" else ()
    wanted = call.wanted_in_forward or Wanted()
    factor = call.x.new_empty((), dtype=call.student.accumulation)
    return call.x.new_empty(shape, dtype=call.loss_dtype), factor, *allocate_gradients(call.student, wanted).each


def _backward_fake(grad_loss: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    call = Arguments(*arguments)
    return tuple(in_dtypes_of(call.differentiable, allocate_gradients(call.student, call.wanted).each))


torch.library.register_fake(NAME, _forward_fake)
torch.library.register_fake(BACKWARD_NAME, _backward_fake)
HeadAutograd(
    "linear_divergence", Arguments, DIFFERENTIABLE, torch.ops.structfly.linear_divergence_backward_v1.default
).register(NAME)

"""``structfly::linear_cross_entropy_v2``: schema, fake, autograd, autocast, vmap and FLOP count of the loss head.

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

from typing import Any

import torch
from torch import Tensor

from structfly.lowering.head.autograd import HeadAutograd
from structfly.lowering.head.linear import DEVICES, DIFFERENTIABLE, GRADIENTS, Wanted, allocate_gradients, in_dtypes_of
from structfly.lowering.linear_cross_entropy import kernels
from structfly.lowering.linear_cross_entropy.arguments import (
    ARGUMENTS,
    BACKWARD_NAME,
    NAME,
    OPERAND_GRADIENTS,
    Arguments,
)

torch.library.define(NAME, f"({ARGUMENTS}) -> (Tensor loss, Tensor factor, {GRADIENTS}, {OPERAND_GRADIENTS})")
torch.library.define(BACKWARD_NAME, f"(Tensor grad_loss, {ARGUMENTS}) -> ({GRADIENTS}, {OPERAND_GRADIENTS})")
torch.library.impl(NAME, DEVICES)(kernels.forward)
torch.library.impl(BACKWARD_NAME, DEVICES)(kernels.backward)


def linear_cross_entropy(*arguments: Any) -> tuple[Any, ...]:
    """Call the op; see :class:`Arguments`.  Returns the loss, the deferred factor, and the gradients made so far, those
    of the operands in a list."""
    result: tuple[Any, ...] = torch.ops.structfly.linear_cross_entropy_v2.default(*arguments)
    return result


def _forward_fake(*arguments: Any) -> tuple[Any, ...]:
    call = Arguments(*arguments)
    shape = call.target.shape if call.reduction == "none" else ()
    wanted = call.wanted_in_forward or Wanted()
    factor = call.x.new_empty((), dtype=call.head.accumulation)
    return call.x.new_empty(shape, dtype=call.loss_dtype), factor, *allocate_gradients(call.head, wanted)


def _backward_fake(grad_loss: Tensor, *arguments: Any) -> tuple[Any, ...]:
    call = Arguments(*arguments)
    made = in_dtypes_of(call.differentiable, allocate_gradients(call.head, call.wanted).each)
    return *made[:5], made[5:]


torch.library.register_fake(NAME, _forward_fake)
torch.library.register_fake(BACKWARD_NAME, _backward_fake)
HeadAutograd(
    "linear_cross_entropy",
    Arguments,
    DIFFERENTIABLE,
    torch.ops.structfly.linear_cross_entropy_backward_v2.default,
    listed="operands",
).register(NAME)

"""``structfly::linear_cross_entropy_v4``: schema, fake, autograd, autocast, vmap and FLOP count of the loss head.

The name carries an ABI version: it goes up with any change of the schema, of the fake or of the autograd formula, so
that a compile cache filled by another version is never served.  Every decision that changes what runs (epilogue,
schedule, workspace, which gradients) is an argument, for the same reason.  Row counts are read at run time.

Two schedules:

* ``"forward"``: a scalar loss whose gradients are made in the forward pass, 6NHC operations.  Backward multiplies
  them by the upstream factor.  Statistics beside it are values without gradient.
* ``"backward"``: the forward makes losses and statistics only and backward makes the logits again, 8NHC.  It serves
  ``reduction="none"``, statistics that are differentiated, and checkpointed regions, where a forward runs twice and
  gradients made there would be thrown away.  It saves the inputs and nothing else: a chunk holds whole rows, so their
  normaliser is at hand when needed.

The scheme "blocks" makes the logits once more than that where it makes gradients.
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
    DIFFERENTIABLE_STATISTICS,
    NAME,
    OPERAND_GRADIENTS,
    RESULTS,
    STATISTICS,
    UPSTREAM,
    Arguments,
    Outputs,
)
from structfly.lowering.replay.replayed import replayed

torch.library.define(NAME, f"({ARGUMENTS}) -> ({RESULTS}, {GRADIENTS}, {OPERAND_GRADIENTS})")
torch.library.define(BACKWARD_NAME, f"({UPSTREAM}, {ARGUMENTS}) -> ({GRADIENTS}, {OPERAND_GRADIENTS})")
torch.library.impl(NAME, DEVICES)(replayed(kernels.forward))
torch.library.impl(BACKWARD_NAME, DEVICES)(replayed(kernels.backward))


def linear_cross_entropy(*arguments: Any) -> Outputs:
    """Call the op; see :class:`Arguments`."""
    return Outputs(*torch.ops.structfly.linear_cross_entropy_v4.default(*arguments))


def _forward_fake(*arguments: Any) -> Outputs:
    call = Arguments(*arguments)
    x, head = call.x, call.head
    shapes = {"chosen": (0,) if call.choices is None else call.choices.shape}

    def statistic(name: str) -> Tensor:
        dtype = torch.int64 if name == "argmax" else head.accumulation
        return x.new_empty(shapes.get(name, x.shape[:1]) if name in call.named_statistics else (0,), dtype=dtype)

    rows = x.shape[:1] if call.reduction == "none" else ()
    loss = x.new_empty((0,) if call.target is None and not call.row_loss else rows, dtype=call.loss_dtype)
    factor = x.new_empty((), dtype=head.accumulation)
    gradients = allocate_gradients(head, call.wanted_in_forward or Wanted())
    return Outputs._make((loss, *map(statistic, STATISTICS), factor, *gradients))


def _backward_fake(*arguments: Any) -> tuple[Any, ...]:
    call = Arguments(*arguments[-len(Arguments._fields) :])
    made = in_dtypes_of(call.differentiable, allocate_gradients(call.head, call.wanted).each)
    return *made[:5], made[5:]


torch.library.register_fake(NAME, _forward_fake)
torch.library.register_fake(BACKWARD_NAME, _backward_fake)
HeadAutograd(
    "linear_cross_entropy",
    Arguments,
    DIFFERENTIABLE,
    torch.ops.structfly.linear_cross_entropy_backward_v4.default,
    listed="operands",
    constants="row_operands",
    statistics={name: name in DIFFERENTIABLE_STATISTICS for name in STATISTICS},
).register(NAME)

"""What the op does at run time: refuse offsets that are none, and leave the rest to the device's lowering."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from structfly.compat import assert_on_device
from structfly.errors import ArgumentError
from structfly.lowering.linear_recurrence import recurrence_aten, recurrence_triton
from structfly.lowering.linear_recurrence.arguments import (
    Arguments,
    Gradients,
    Outputs,
    lowering_of,
    states_for_backward,
)


def forward(call: Arguments) -> Outputs:
    """Fulfils the op's contract."""
    _check_offsets(call)
    return Outputs._make(_lowering(call).forward(call))


def backward(
    call: Arguments, states: Tensor, grad_output: Tensor | None, grad_final: Tensor | None, made: Gradients
) -> None:
    """Write the gradients that are wanted where ``made`` says."""
    lowering = _lowering(call)
    if not call.keep:
        call = call._replace(keep=True)
        states = states_for_backward(call, lowering.forward(call))
    lowering.backward(call, states, grad_output, grad_final, made)


def _lowering(call: Arguments) -> ModuleType:
    return {"aten": recurrence_aten, "triton": recurrence_triton}[lowering_of(call.input)]


def _check_offsets(call: Arguments) -> None:
    offsets = call.offsets
    if offsets is None:
        return
    length = call.input.shape[1]
    right = (offsets[0] == 0) & (offsets[-1] == length) & (offsets.diff() >= 0).all()
    message = f"offsets must go from 0 up to the length, {length}, and never down"
    if offsets.is_cuda:
        assert_on_device(right, message)
    elif not bool(right):
        raise ArgumentError(f"offsets are {offsets.tolist()}; {message}; they are the running sum of the lengths")

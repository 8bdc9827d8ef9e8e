"""FLOP formulas for :class:`torch.utils.flop_counter.FlopCounterMode`.

A module of its own, imported when something is compiled: torch's flop counter imports triton, which importing
structfly must not do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from structfly.lowering.linear_recurrence import op as _op  # noqa: F401  defines the ops
from structfly.lowering.linear_recurrence import projected_op as _projected_op  # noqa: F401
from structfly.lowering.linear_recurrence.arguments import UPSTREAM, Arguments, JointArguments, ProjectedArguments

_BESIDE = UPSTREAM.count(",") + 1  # what the backward takes before the op's arguments


@register_flop_formula(torch.ops.structfly.linear_recurrence_v1, get_raw=True)
def _forward_flops(*arguments: Any, out_val: Any = None, **_: Any) -> int:
    return _forward(Arguments(*arguments))


@register_flop_formula(torch.ops.structfly.joint_linear_recurrence_v1, get_raw=True)
def _joint_forward_flops(*arguments: Any, out_val: Any = None, **_: Any) -> int:
    return _forward(JointArguments(*arguments).separate)


@register_flop_formula(torch.ops.structfly.projected_linear_recurrence_v1, get_raw=True)
def _projected_flops(*arguments: Any, out_val: Any = None, **_: Any) -> int:
    """Those of the map, and of the recurrence of what it makes."""
    call = ProjectedArguments(*arguments)
    batch, (out, inner) = call.inputs.shape[0], call.weight.shape
    made = call.inputs.new_empty(batch, call.steps, out, device="meta")
    return 2 * batch * call.steps * out * inner + _forward(call.joint(made, None).separate)


@register_flop_formula(torch.ops.structfly.linear_recurrence_backward_v1, get_raw=True)
def _backward_flops(*arguments: Any, out_val: Any = None, **_: Any) -> int:
    *values, wanted = arguments[_BESIDE:]
    return _backward(Arguments(*values), wanted)


@register_flop_formula(torch.ops.structfly.joint_linear_recurrence_backward_v1, get_raw=True)
def _joint_backward_flops(*arguments: Any, out_val: Any = None, **_: Any) -> int:
    *values, wanted = arguments[_BESIDE:]
    call = JointArguments(*values).separate
    joint, initial = wanted
    return _backward(call, [joint and each is not None for each in call.differentiable[:-1]] + [initial])


def _forward(call: Arguments) -> int:
    return call.input.numel() * (_states(call) + (call.output_gate is not None))


def _backward(call: Arguments, wanted: Sequence[bool]) -> int:
    """The states again, the adjoint, and a product for each gradient."""
    adjoint = 2 + (call.output_gate is not None)
    weighted = call.complement or call.input_gate is not None
    products = sum(map(bool, (wanted[0], wanted[1] and weighted, wanted[2], wanted[3])))
    return call.input.numel() * (_states(call) + adjoint + products)


def _states(call: Arguments) -> int:
    """Multiplications and additions of a step; activations and 1 - f count nothing."""
    return 2 + (call.complement or call.input_gate is not None)

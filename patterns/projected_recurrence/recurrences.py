"""Calls of the recurrence's ops, which other rules and the user's program write, read as one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from structfly.lowering.linear_recurrence import op as _op  # noqa: F401  defines what rules write
from structfly.lowering.linear_recurrence.arguments import LETTERS
from structfly.ops import joint_recurrence, recurrence  # noqa: F401  define what programs call

_SEPARATE: tuple[Any, ...] = (
    torch.ops.structfly.linear_recurrence_v1.default,
    torch.ops.structfly.called_v1_linear_recurrence_v1.default,
)
_JOINT: tuple[Any, ...] = (
    torch.ops.structfly.joint_linear_recurrence_v1.default,
    torch.ops.structfly.called_v1_joint_linear_recurrence_v1.default,
)


@dataclass(frozen=True)
class RecurrenceCall:
    """A call, whichever of the ops it is of.

    Attributes:
        node: the call.
        sequences: gates and input, by their letter, or nothing where they are in one tensor.
        joint: that tensor and its order, or None.
        initial: the states before the first steps, or None.
        restarts: whether sequences begin anew on their way: there are resets, or offsets of packed sequences.
        complement, sigmoid, tanh, reverse: as of the ops.
    """

    node: fx.Node
    sequences: Mapping[str, fx.Node]
    joint: tuple[fx.Node, str] | None
    initial: fx.Node | None
    restarts: bool
    complement: bool
    sigmoid: bool
    tanh: bool
    reverse: bool


def read_recurrence(node: fx.Node) -> RecurrenceCall | None:
    """The call that a node is, or None."""
    if node.op != "call_function" or node.target not in (*_SEPARATE, *_JOINT):
        return None
    target: Any = node.target
    names = (argument.name for argument in target._schema.arguments)
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    parts = {letter: given.get(name) for letter, name in LETTERS.items()}
    return RecurrenceCall(
        node=node,
        sequences={letter: part for letter, part in parts.items() if part is not None},
        joint=(given["joint"], given["order"]) if node.target in _JOINT else None,
        initial=given.get("initial", given.get("initial_state")),
        restarts=given["reset"] is not None or given["offsets"] is not None,
        complement=given["complement"],
        sigmoid=given.get("sigmoid", given.get("gate_activation") == "sigmoid"),
        tanh=given.get("tanh", given.get("input_activation") == "tanh"),
        reverse=given["reverse"],
    )

"""The op's call: a recurrence that was read, written into a graph."""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import sympy
import torch
from torch import Tensor, fx

from structfly.compat import expression
from structfly.lowering.linear_recurrence import op as _op  # noqa: F401  defines it
from structfly.lowering.linear_recurrence.arguments import LETTERS, Arguments, JointArguments
from structfly.patterns.linear_recurrence.folding import Folded
from structfly.patterns.linear_recurrence.joint import joint_of
from structfly.patterns.linear_recurrence.lifting import Lifted, Lifting
from structfly.rewriter.editor import Editor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""Of states."""

_OP: Any = torch.ops.structfly.linear_recurrence_v1.default
_JOINT_OP: Any = torch.ops.structfly.joint_linear_recurrence_v1.default


@dataclass(frozen=True)
class Recurrence:
    """What the op is to compute.

    Attributes:
        step: what one step does, by the op's arguments.
        initial: the state before the first, a node or a number.
        zeros: whether that is 0.
        like: an example of a state.
        backward: whether the first step is the last in time.
        gradient: whether a gradient is needed.
        autocast: whether it runs under autocast, so that examples do not tell the dtype of products.
    """

    step: Folded
    initial: fx.Node | float
    zeros: bool
    like: Tensor
    backward: bool
    gradient: bool
    autocast: bool

    @property
    def rank(self) -> int:
        """Dimensions of a state."""
        return self.like.ndim

    @property
    def numbers(self) -> sympy.Expr:
        """How many numbers a state has."""
        return sympy.prod([expression(size) for size in self.like.shape])


class Written(NamedTuple):
    """The op's call, and all states (steps, *state) in the order of time, or what an output gate makes of them."""

    call: fx.Node
    states: fx.Node


def write(site: Recurrence, lift: Lifting, editor: Editor, own: Collection[fx.Node]) -> Written:
    """Write the call, with what ``lift`` makes of the step's gates and input, in the place of the nodes ``own``."""
    step = site.step
    names = [name for name in LETTERS.values() if getattr(step, name) is not None]
    lifted = [_timed(lift(getattr(step, name)), site, editor) for name in names]
    tensors, initial = _broadcast(lifted, site, editor)
    reset = None if step.reset is None else _mask(lift(step.reset), tensors[1], site, editor)
    sequences = {name: _sequence(tensor, site.rank, editor) for name, tensor in zip(names, tensors, strict=True)}
    arguments: dict[str, Any] = {
        "initial": None if initial is None else _batched(initial, site.rank, editor),
        "reset": reset,
        "offsets": None,
        "complement": step.complement,
        "sigmoid": step.sigmoid,
        "tanh": step.tanh,
        "reverse": site.backward,
        "keep": site.gradient,
    }
    letters = {letter: sequences[name] for letter, name in LETTERS.items() if name in sequences}
    joint = joint_of(letters, own, editor) if site.gradient else None
    if joint is not None:
        arguments |= {"joint": joint.tensor, "order": joint.order}
        call = editor.call(_JOINT_OP, *JointArguments(**arguments))
    else:
        arguments |= {name: sequences.get(name) for name in LETTERS.values()}
        call = editor.call(_OP, *Arguments(**arguments))
    return Written(call, _by_time(editor.getitem(call, 0), tuple(site.like.shape), editor))


def last_state(site: Recurrence, written: Written, editor: Editor) -> fx.Node:
    """The state after the last step, in the states' dtype."""
    shape = tuple(site.like.shape)
    state = editor.getitem(written.call, 1)
    if len(shape) == 0:
        state = editor.call(torch.reshape, state, ())
    elif len(shape) == 1:
        state = editor.call(torch.squeeze, state, 0)
    elif len(shape) > 2:
        state = editor.call(torch.unflatten, state, 1, shape[1:])
    dtype = site.like.dtype
    return state if state.meta["example_value"].dtype == dtype else editor.method("to", state, dtype)


def _timed(value: Lifted, site: Recurrence, editor: Editor) -> fx.Node:
    """A value with time and all dimensions of a state, in a dtype that the op takes beside the states'."""
    node = value.value
    if not isinstance(node, fx.Node):
        shape = (1,) * (site.rank + 1)
        return editor.call(torch.full, shape, node, dtype=site.like.dtype, device=site.like.device)
    missing = site.rank - value.rank
    if value.timed and missing:
        node = editor.call(operator.getitem, node, (slice(None), *[None] * missing))
    elif not value.timed:
        node = editor.call(operator.getitem, node, (*[None] * (missing + 1), Ellipsis))
    dtype = node.meta["example_value"].dtype
    if not dtype.is_floating_point or (torch.float64 in (dtype, site.like.dtype) and dtype != site.like.dtype):
        node = editor.method("to", node, site.like.dtype)
    return node


def _broadcast(tensors: list[fx.Node], site: Recurrence, editor: Editor) -> tuple[list[fx.Node], fx.Node | None]:
    """Gates and input in the shape of all states, the input in their dtype; and the initial state."""
    initial = site.initial
    shapes = [tuple(map(expression, each.meta["example_value"].shape)) for each in tensors]
    full = tuple(map(expression, site.like.shape))
    covered = all(any(shape[dim + 1] == size for shape in shapes) for dim, size in enumerate(full))
    joined = list(tensors)
    begins = not site.zeros or (isinstance(initial, fx.Node) and not covered)
    first = None
    if begins:
        initial = editor.current(initial) if isinstance(initial, fx.Node) else initial
        first = _timed(Lifted(initial, False), site, editor)
    if first is not None and not covered:
        joined.append(first)
    if len(set(shapes)) > 1 or shapes[0][1:] != full or len(joined) > len(tensors):
        broadcast = editor.call(torch.broadcast_tensors, *joined)
        joined = [editor.getitem(broadcast, place) for place in range(len(joined))]
    if site.autocast or joined[1].meta["example_value"].dtype != site.like.dtype:
        joined[1] = editor.method("to", joined[1], site.like.dtype)
    if first is None:
        return joined, None
    # Where sequences cover them, states need nothing of those, which may not be there in the end.
    first = _expanded(first, joined[1], editor) if covered else joined.pop()
    return joined, editor.call(torch.select, first, 0, 0)


def _expanded(first: fx.Node, like: fx.Node, editor: Editor) -> fx.Node:
    """A state with time before it, (1, *some of its dimensions), as large as those of ``like``."""
    mine, theirs = (tuple(map(expression, each.meta["example_value"].shape[1:])) for each in (first, like))
    if mine == theirs:
        return first
    sizes = [editor.size(like, dim + 1) for dim in range(len(theirs))]
    return editor.method("expand", first, 1, *sizes)


def _sequence(node: fx.Node, rank: int, editor: Editor) -> fx.Node:
    """(steps, *state) as (batch, steps, channels)."""
    if rank == 0:
        return editor.call(operator.getitem, node, (None, slice(None), None))
    if rank == 1:
        return editor.call(torch.unsqueeze, node, 0)
    node = editor.call(torch.movedim, node, 0, 1)
    return node if rank == 2 else editor.call(torch.flatten, node, 2)


def _batched(node: fx.Node, rank: int, editor: Editor) -> fx.Node:
    """A state as (batch, channels)."""
    if rank == 0:
        return editor.call(torch.reshape, node, (1, 1))
    if rank == 1:
        return editor.call(torch.unsqueeze, node, 0)
    return node if rank == 2 else editor.call(torch.flatten, node, 1)


def _mask(mask: Lifted, input: fx.Node, site: Recurrence, editor: Editor) -> fx.Node:
    """(batch, steps), of a mask whose channels are alike."""
    node = _aligned_mask(mask, site.rank, editor)
    if site.rank < 2:
        node = editor.call(torch.reshape, node, (1, -1))
        return editor.method("expand", node, 1, editor.size(input, 0))
    node = editor.call(operator.getitem, node, (slice(None), slice(None), *[0] * (site.rank - 1)))
    return editor.call(torch.t, editor.method("expand", node, editor.size(input, 0), editor.size(input, 1)))


def _aligned_mask(mask: Lifted, rank: int, editor: Editor) -> fx.Node:
    node: fx.Node = mask.value
    missing = rank - mask.rank
    if mask.timed:
        return editor.call(operator.getitem, node, (slice(None), *[None] * missing)) if missing else node
    return editor.call(operator.getitem, node, (*[None] * (missing + 1), Ellipsis))


def _by_time(output: fx.Node, shape: tuple[Any, ...], editor: Editor) -> fx.Node:
    """(batch, steps, channels) as (steps, *state)."""
    if len(shape) == 0:
        return editor.call(operator.getitem, output, (0, slice(None), 0))
    if len(shape) == 1:
        return editor.call(torch.squeeze, output, 0)
    if len(shape) > 2:
        output = editor.call(torch.unflatten, output, 2, shape[1:])
    return editor.call(torch.movedim, output, 1, 0)

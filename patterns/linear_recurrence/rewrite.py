"""Writing the op, and what goes to the users of the states, into the graph."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from structfly.compat import expression
from structfly.lowering.linear_recurrence.arguments import Arguments
from structfly.patterns.linear_recurrence.collectors import Collector
from structfly.patterns.linear_recurrence.expressions import Expression
from structfly.patterns.linear_recurrence.lifting import Lifted, Lifting, Steps, steps_of
from structfly.patterns.linear_recurrence.site import LoopSite
from structfly.patterns.linear_recurrence.steps import Run
from structfly.rewriter.editor import Editor

_OP: Any = torch.ops.structfly.linear_recurrence_v1.default


def rewrite_loop(site: LoopSite, editor: Editor) -> None:
    """Compute all states where the loop's inputs are there, and give them to their users."""
    loop = site.loop
    steps = steps_of(loop.runs, len(loop.states))
    _go_to_place(site, editor)
    lift = Lifting(editor, _parts(loop.runs, steps, editor))
    gate, input = (_timed(lift(value), site, editor) for value in (site.step.gate, site.step.input))
    gate, input, initial = _broadcast(gate, input, site, editor)
    reset = None if site.step.reset is None else _mask(lift(site.step.reset), input, site, editor)
    sequences = [_sequence(each, site.rank, editor) for each in (gate, input)]
    call: dict[str, Any] = {
        "gate": sequences[0],
        "input": sequences[1],
        "input_gate": None,
        "output_gate": None,
        "initial": None if initial is None else _batched(initial, site.rank, editor),
        "reset": reset,
        "offsets": None,
        "complement": False,
        "sigmoid": False,
        "tanh": False,
        "reverse": steps.backward,
        "keep": site.gradient,
    }
    made = editor.call(_OP, *Arguments(**call))
    output = editor.getitem(made, 0)
    shape = tuple(site.node.meta["example_value"].shape)
    states = _by_time(output, shape, editor)
    _give_single(site, steps, states, made, shape, editor)
    for collector in site.collectors:
        _collect(collector, site, steps, states, editor)
    editor.erase(site.dead_nodes)


def _go_to_place(site: LoopSite, editor: Editor) -> None:
    """Where the loop begins, or behind the last of what it is made of."""
    needed = [editor.current(node) for node in site.loop.needed]
    order = {node: place for place, node in enumerate(site.node.graph.nodes)}
    last, first = (f(nodes, key=order.__getitem__) for f, nodes in ((max, needed), (min, site.loop.nodes)))
    if order[first] > order[last]:
        editor.before(first)
    else:
        editor.after(last)


def _parts(runs: tuple[Run, ...], steps: Steps, editor: Editor) -> Any:
    made: dict[Run, fx.Node] = {}

    def part(number: int) -> fx.Node:
        run = runs[number]
        if run not in made:
            made[run] = steps.whole(run, editor)
        return made[run]

    return part


# ----------------------------------------------------------------------------------------------- the op's arguments


def _timed(value: Lifted, site: LoopSite, editor: Editor) -> fx.Node:
    """A value with time and all dimensions of a state, in a dtype that the op takes beside the states'."""
    node = value.value
    if not isinstance(node, fx.Node):
        device = site.node.meta["example_value"].device
        return editor.call(torch.full, (1,) * (site.rank + 1), node, dtype=site.dtype, device=device)
    missing = site.rank - value.rank
    if value.timed and missing:
        node = editor.call(operator.getitem, node, (slice(None), *[None] * missing))
    elif not value.timed:
        node = editor.call(operator.getitem, node, (*[None] * (missing + 1), Ellipsis))
    dtype = node.meta["example_value"].dtype
    if not dtype.is_floating_point or (torch.float64 in (dtype, site.dtype) and dtype != site.dtype):
        node = editor.method("to", node, site.dtype)
    return node


def _broadcast(
    gate: fx.Node, input: fx.Node, site: LoopSite, editor: Editor
) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """Gate and input in the shape of all states, the input in their dtype; and the initial state."""
    tensors = [gate, input]
    initial = site.loop.initial
    shapes = [tuple(map(expression, each.meta["example_value"].shape)) for each in tensors]
    full = tuple(map(expression, site.node.meta["example_value"].shape))
    covered = all(any(shape[dim + 1] == size for shape in shapes) for dim, size in enumerate(full))
    begins = not site.loop.begins_with_zeros
    if begins or (isinstance(initial, fx.Node) and not covered):
        initial = editor.current(initial) if isinstance(initial, fx.Node) else initial
        tensors.append(_timed(Lifted(initial, False), site, editor))
    if any(shape[1:] != full for shape in shapes) or len(tensors) > 2 or shapes[0] != shapes[1]:
        joined = editor.call(torch.broadcast_tensors, *tensors)
        tensors = [editor.getitem(joined, place) for place in range(len(tensors))]
    if site.autocast or tensors[1].meta["example_value"].dtype != site.dtype:
        tensors[1] = editor.method("to", tensors[1], site.dtype)
    return tensors[0], tensors[1], editor.call(torch.select, tensors[2], 0, 0) if len(tensors) > 2 else None


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


def _mask(mask: Lifted, input: fx.Node, site: LoopSite, editor: Editor) -> fx.Node:
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


# -------------------------------------------------------------------------------------------- what the states become


def _by_time(output: fx.Node, shape: tuple[Any, ...], editor: Editor) -> fx.Node:
    """(batch, steps, channels) as (steps, *state)."""
    if len(shape) == 0:
        return editor.call(operator.getitem, output, (0, slice(None), 0))
    if len(shape) == 1:
        return editor.call(torch.squeeze, output, 0)
    if len(shape) > 2:
        output = editor.call(torch.unflatten, output, 2, shape[1:])
    return editor.call(torch.movedim, output, 1, 0)


def _give_single(
    site: LoopSite, steps: Steps, states: fx.Node, made: fx.Node, shape: tuple[Any, ...], editor: Editor
) -> None:
    """Single states to those who use them."""
    last = steps.length - 1
    parts = None
    for step, old in enumerate(site.loop.states):
        users = [user for user in old.users if user not in site.own]
        if not users:
            continue
        if step == last:
            state = editor.getitem(made, 1)
            if len(shape) == 1:
                state = editor.call(torch.squeeze, state, 0)
            elif len(shape) != 2:
                state = (
                    editor.call(torch.reshape, state, ())
                    if not shape
                    else editor.call(torch.unflatten, state, 1, shape[1:])
                )
            if state.meta["example_value"].dtype != site.dtype:
                state = editor.method("to", state, site.dtype)
        else:
            parts = parts or editor.call(torch.unbind, states, 0)
            state = editor.getitem(parts, last - step if steps.backward else step)
        editor.replace(old, state, users)


def _collect(collector: Collector, site: LoopSite, steps: Steps, states: fx.Node, editor: Editor) -> None:
    """Make a collector from all states."""
    editor.before(*(collector.writes or (collector.node,)))
    part = Steps(collector.count, steps.backward)
    if collector.count < steps.length:
        first = steps.length - collector.first - collector.count if steps.backward else collector.first
        states = editor.call(torch.narrow, states, 0, first, collector.count)
    lift = Lifting(editor, _parts(collector.runs, part, editor), states)
    node = _lifted(collector.value, lift)
    if collector.backward != steps.backward:
        node = editor.call(torch.flip, node, (0,))
    if collector.kept:
        node = editor.call(torch.squeeze, node, collector.dim + 1)
    if collector.dim:
        node = editor.call(torch.movedim, node, 0, collector.dim)
    if collector.before or collector.after:
        node = _joined(collector, node, editor)
    node = _laid_out(node, collector.node, editor)
    if collector.writes:
        editor.replace(collector.node, node, [user for user in collector.node.users if user not in collector.writes])
    else:
        editor.replace(collector.node, node)


def _lifted(value: Expression, lift: Lifting) -> fx.Node:
    node: fx.Node = lift(value).value
    return node


def _joined(collector: Collector, node: fx.Node, editor: Editor) -> fx.Node:
    def single(value: fx.Node) -> fx.Node:
        return value if collector.kept else editor.call(torch.unsqueeze, value, collector.dim)

    joined = [
        *map(single, map(editor.current, collector.before)),
        node,
        *map(single, map(editor.current, collector.after)),
    ]
    return editor.call(torch.cat, joined, collector.dim)


def _laid_out(node: fx.Node, like: fx.Node, editor: Editor) -> fx.Node:
    """The same values with the strides that users were compiled for."""
    mine, theirs = (tuple(map(expression, each.meta["example_value"].stride())) for each in (node, like))
    return node if mine == theirs else editor.method("contiguous", node)

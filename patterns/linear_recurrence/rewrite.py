"""Writing the op in the place of a loop, and what goes to the users of its states, into the graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from structfly.compat import expression
from structfly.patterns.linear_recurrence.collectors import Collector
from structfly.patterns.linear_recurrence.lifting import Lifting, Steps, steps_of
from structfly.patterns.linear_recurrence.recurrence import Written, last_state, write
from structfly.patterns.linear_recurrence.site import LoopSite
from structfly.patterns.linear_recurrence.steps import Run
from structfly.rewriter.calls import read
from structfly.rewriter.editor import Editor
from structfly.rewriter.views import VIEWS


def rewrite_loop(site: LoopSite, editor: Editor) -> None:
    """Compute all states where the loop's inputs are there, and give them to their users."""
    steps = steps_of(site.loop.runs, len(site.loop.states))
    _go_to_place(site, editor)
    written = write(site.recurrence, Lifting(editor, parts_of(site.loop.runs, steps, editor)), editor, site.dead_nodes)
    _give_single(site, steps, written, editor)
    for collector in site.collectors:
        _collect(collector, steps, written.states, editor)
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


def parts_of(runs: tuple[Run, ...], steps: Steps, editor: Editor) -> Callable[[int], fx.Node]:
    """The sequences of parts by their number, each written once."""
    made: dict[Run, fx.Node] = {}

    def part(number: int) -> fx.Node:
        run = runs[number]
        if run not in made:
            made[run] = steps.whole(run, editor)
        return made[run]

    return part


def _give_single(site: LoopSite, steps: Steps, written: Written, editor: Editor) -> None:
    """Single states to those who use them."""
    last = steps.length - 1
    parts = None
    for step, old in enumerate(site.loop.states):
        users = [user for user in old.users if user not in site.own]
        if not users:
            continue
        if step == last:
            state = last_state(site.recurrence, written, editor)
        else:
            parts = parts or editor.call(torch.unbind, written.states, 0)
            state = editor.getitem(parts, last - step if steps.backward else step)
        editor.replace(old, state, users)


def _collect(collector: Collector, steps: Steps, states: fx.Node, editor: Editor) -> None:
    """Make a collector from all states."""
    editor.before(*(collector.writes or (collector.node,)))
    part = Steps(collector.count, steps.backward)
    if collector.count < steps.length:
        first = steps.length - collector.first - collector.count if steps.backward else collector.first
        states = editor.call(torch.narrow, states, 0, first, collector.count)
    lift = Lifting(editor, parts_of(collector.runs, part, editor), states)
    node: fx.Node = lift(collector.value).value
    if collector.backward != steps.backward:
        node = editor.call(torch.flip, node, (0,))
    if collector.kept:
        node = editor.call(torch.squeeze, node, collector.dim + 1)
    if collector.dim:
        node = editor.call(torch.movedim, node, 0, collector.dim)
    if collector.before or collector.after:
        node = _joined(collector, node, editor)
    node = laid_out(node, collector.node, editor)
    if collector.writes:
        editor.replace(collector.node, node, [user for user in collector.node.users if user not in collector.writes])
    else:
        editor.replace(collector.node, node)


def _joined(collector: Collector, node: fx.Node, editor: Editor) -> fx.Node:
    def single(value: fx.Node) -> fx.Node:
        return value if collector.kept else editor.call(torch.unsqueeze, value, collector.dim)

    joined = [
        *map(single, map(editor.current, collector.before)),
        node,
        *map(single, map(editor.current, collector.after)),
    ]
    return editor.call(torch.cat, joined, collector.dim)


def laid_out(node: fx.Node, like: fx.Node, editor: Editor) -> fx.Node:
    """The same values, where someone may look at strides with those that ``like`` has."""
    mine, theirs = (tuple(map(expression, each.meta["example_value"].stride())) for each in (node, like))
    return node if mine == theirs or not _strides_count(like) else editor.method("contiguous", node)


def _strides_count(node: fx.Node) -> bool:
    """Whether a value, or a view of it, leaves the graph or is viewed in a way that not all strides allow."""
    for user in node.users:
        call = read(user)
        if user.op == "output" or call is None or call.op == "view" or (call.op in VIEWS and _strides_count(user)):
            return True
    return False

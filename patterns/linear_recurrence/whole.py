"""Recurrences that are written with whole tensors: gates and inputs of all steps, and states of all steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import fx

from structfly import compat
from structfly.lowering.linear_recurrence.op import DEVICES
from structfly.patterns.linear_recurrence.affine import Affine
from structfly.patterns.linear_recurrence.expressions import Expression, Part
from structfly.patterns.linear_recurrence.folding import fold, opened, opened_run
from structfly.patterns.linear_recurrence.lifting import Lifting, Steps
from structfly.patterns.linear_recurrence.recurrence import DTYPES, Recurrence, write
from structfly.patterns.linear_recurrence.rewrite import laid_out, parts_of
from structfly.patterns.linear_recurrence.site import RecurrenceSite
from structfly.patterns.linear_recurrence.slices import WHOLE, Sequence
from structfly.patterns.linear_recurrence.steps import Run
from structfly.records import Miss, Stage
from structfly.rewriter.calls import read
from structfly.rewriter.editor import Editor
from structfly.rewriter.region import Region, example, needs_gradient, qualified_name
from structfly.rewriter.writes import written


@dataclass(frozen=True)
class WholeSite(RecurrenceSite):
    """States of all steps.

    Attributes:
        runs: what gates and input are made of, and what these are activations of.
        dim: time.
        nodes: what they are made by now, and ``result``.
        last: the last node that writes into them, if they are made in place.
        result: what the op makes: the states, or their product with an output gate.
    """

    runs: tuple[Run, ...]
    dim: int
    nodes: frozenset[fx.Node]
    last: fx.Node | None
    result: fx.Node

    @property
    def dead_nodes(self) -> tuple[fx.Node, ...]:
        return tuple(self.nodes)


def _itself(value: Expression) -> Expression:
    return value


class Source(NamedTuple):
    """A tensor that a gate or an input is made of, step by step.

    Attributes:
        tensor: the tensor.
        made: what is made of a step's slice.
        dim: time, where it has not that and all other dimensions where the states have them.
    """

    tensor: fx.Node
    made: Callable[[Expression], Expression] = _itself
    dim: int | None = None


def whole_site(
    node: fx.Node,
    gate: Source,
    input: Source,
    dim: int,
    nodes: frozenset[fx.Node],
    kept: Callable[[Recurrence, int], tuple[Stage, ...]],
    region: Region,
    rule: str,
    last: fx.Node | None = None,
    initial: fx.Node | None = None,
) -> WholeSite | Miss:
    """The recurrence that makes the states ``node``, or why it is none that the op computes.

    Args:
        node: the states.
        gate, input: what they are made of.
        dim: time.
        nodes: what they are made by now.
        kept: the kernels of that.
        region: where they are.
        rule: which finds them.
        last: the last node that writes into them, if one does.
        initial: the state before the first step, or None for zeros.
    """
    value = example(node)
    assert value is not None

    def miss(reason: str) -> Miss:
        return Miss(rule, node, reason, 1, node, qualified_name(node))

    length, places = value.shape[dim], [dim if each.dim is None else each.dim for each in (gate, input)]
    if value.dtype not in DTYPES or value.device.type not in DEVICES:
        return miss(f"states of {value.dtype} on {value.device.type}; supported: {DTYPES} on {DEVICES}")
    for name, source, place in zip(("gate", "input"), (gate, input), places, strict=True):
        its = example(source.tensor)
        if its is None or (source.dim is None and its.ndim != value.ndim) or its.shape[place] != length:
            return miss(f"the {name} has fewer dimensions or steps than the states")
    if value.ndim > 3 and not all(isinstance(size, int) for size in value.shape):
        return miss("states of more than two dimensions, of which one is not constant")
    if len({region.modes[each] for each in nodes}) > 1:
        return miss("gradients or autocast are switched between the operations")
    with compat.example_mode(compat.fake_mode_of([value])):
        like = torch.select(value, dim, 0)
    runs = tuple(_run(source.tensor, place) for source, place in zip((gate, input), places, strict=True))
    step, runs = opened(Affine(gate.made(Part(0)), input.made(Part(1))), runs)
    folded, result = fold(step), node
    gated = _output_gate(node, nodes, region, dim, sigmoid=folded.sigmoid)
    if gated is not None:
        result, run = gated
        folded, runs = folded._replace(output_gate=Part(len(runs))), (*runs, run)
    recurrence = Recurrence(
        step=folded,
        initial=0.0 if initial is None else initial,
        zeros=initial is None,
        like=like,
        backward=False,
        gradient=needs_gradient(node),
        autocast=len(region.modes[node]) > 1,
    )
    return WholeSite(
        rule=rule,
        name=qualified_name(node),
        node=node,
        device=value.device,
        sizes=compat.size_hints(value),
        recurrence=recurrence,
        kept=kept(recurrence, length),
        steps=length,
        runs=runs,
        dim=dim,
        nodes=nodes if result is node else nodes | {result},
        last=last,
        result=result,
    )


def _run(tensor: fx.Node, dim: int) -> Run:
    """All of a tensor, step by step."""
    value = example(tensor)
    assert value is not None
    return Run(Sequence(tensor, dim, None, (WHOLE,) * (value.ndim - 1)), 0, 1)


def _kind(tensor: torch.Tensor | None) -> object:
    return None if tensor is None else (tensor.dtype, *map(compat.expression, tensor.shape))


def _output_gate(
    states: fx.Node, nodes: frozenset[fx.Node], region: Region, dim: int, *, sigmoid: bool
) -> tuple[fx.Node, Run] | None:
    """The product of states that are not used otherwise with a gate that is there before them, and the gate, or with
    ``sigmoid`` that of which it is the sigmoid."""
    users = [user for user in states.users if user not in nodes]
    call = read(users[0]) if len(users) == 1 else None
    if call is None or call.op != "mul" or written(call.node) or region.modes[call.node] != region.modes[states]:
        return None
    gate = call["other"] if call["input"] is states else call["input"]
    kinds = {_kind(example(each)) for each in (states, gate, call.node)}
    if len(kinds) > 1 or gate is states or region.order[gate] > region.order[states] or len(region.modes[states]) > 1:
        return None
    run = _run(gate, dim)
    found = opened_run(run, "sigmoid") if sigmoid else run
    return None if found is None else (call.node, found)


def rewrite_whole(site: WholeSite, editor: Editor) -> None:
    """Write the op where the states stand."""
    if site.last is not None:
        editor.after(site.last)
    steps = Steps(site.node.meta["example_value"].shape[site.dim], False)
    states = write(site.recurrence, Lifting(editor, parts_of(site.runs, steps, editor)), editor, site.nodes).states
    whole = editor.call(torch.movedim, states, 0, site.dim) if site.dim else states
    users = [user for user in site.result.users if user not in site.nodes]
    editor.replace(site.result, laid_out(whole, site.result, editor), users)
    editor.erase(site.dead_nodes)

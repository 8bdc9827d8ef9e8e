"""Output gates: where a loop's states are used as o c alone, the op makes that, and no states are written.

That pays where the op finds o as it takes it: a slice of a tensor, or the sigmoid of one where it makes sigmoids
itself.
"""

from __future__ import annotations

from dataclasses import replace

from structfly.compat import expression
from structfly.patterns.linear_recurrence.collectors import Collector
from structfly.patterns.linear_recurrence.expressions import Expression, Operation, Part, State, inner, replaced
from structfly.patterns.linear_recurrence.folding import opened_run
from structfly.patterns.linear_recurrence.lifting import steps_of
from structfly.patterns.linear_recurrence.site import LoopSite
from structfly.patterns.linear_recurrence.steps import Run
from structfly.rewriter.region import Region, example


def with_output_gate(site: LoopSite, region: Region) -> LoopSite:
    """The site with the output gate that all its collectors have, where the op can take it."""
    gates = {_gate(each, site) for each in site.collectors}
    found = gates.pop() if len(gates) == 1 else None
    if found is None or site.recurrence.autocast or not _is_early(found[1], site, region):
        return site
    gate, run = found
    inner_states, length = site.loop.states[:-1], len(site.loop.states)
    if not all(user in site.own for state in inner_states for user in state.users):
        return site
    loop = replace(site.loop, runs=(*site.loop.runs, run))
    if steps_of(loop.runs, length) != steps_of(site.loop.runs, length):
        return site
    step = site.recurrence.step._replace(output_gate=replaced(gate, Part(0), Part(len(site.loop.runs))))
    return replace(
        site,
        loop=loop,
        recurrence=replace(site.recurrence, step=step),
        collectors=tuple(replace(each, value=State(), runs=()) for each in site.collectors),
    )


def _gate(collector: Collector, site: LoopSite) -> tuple[Expression, Run] | None:
    """What a collector of all steps multiplies the states with, or where the op makes sigmoids that of which it is the
    sigmoid, and the one sequence that it is of, as part 0; None where it does something else."""
    value, like = collector.value, site.recurrence.like
    if not isinstance(value, Operation) or value.op != "mul" or collector.count != len(site.loop.states):
        return None
    factors = [value["input"], value["other"]]
    made = example(value.node)
    if State() not in factors or made is None or made.dtype != like.dtype:
        return None
    if [*map(expression, made.shape)] != [*map(expression, like.shape)]:
        return None
    factors.remove(State())
    (gate,) = factors
    if site.recurrence.step.sigmoid:
        if isinstance(gate, Part):
            run = opened_run(collector.runs[gate.number], "sigmoid")
            return None if run is None else (Part(0), run)
        if not isinstance(gate, Operation) or gate.op != "sigmoid":
            return None
        gate = gate["input"]
    part = _viewed(gate)
    return None if part is None else (replaced(gate, part, Part(0)), collector.runs[part.number])


def _viewed(value: Expression) -> Part | None:
    """The slice that a value is a view of."""
    if isinstance(value, Operation) and value.op in _VIEWS:
        operands = list(inner(value))
        return _viewed(operands[0]) if len(operands) == 1 else None
    return value if isinstance(value, Part) else None


_VIEWS = ("getitem", "chunk", "split", "unbind", "squeeze", "unsqueeze")


def _is_early(run: Run, site: LoopSite, region: Region) -> bool:
    """Whether the gate is there where the op is to stand."""
    order = region.order
    return order[run.sequence.source] <= max(order[node] for node in site.loop.needed)

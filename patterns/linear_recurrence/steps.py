"""A loop's steps: proof that all are the same function of their own slices and of the state before.

The last step is the pattern, and every other one is compared with it, node by node.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import NamedTuple

from torch import fx

from structfly.patterns.linear_recurrence.expressions import Expression
from structfly.patterns.linear_recurrence.loops import MIN_STEPS, SlicedNodes, Way
from structfly.patterns.linear_recurrence.operations import name_of
from structfly.patterns.linear_recurrence.slices import Sequence
from structfly.patterns.linear_recurrence.step_pattern import Match, Pattern


class Run(NamedTuple):
    """The slices at one place of a step: step ``t`` of the loop takes index ``first + stride t`` of a sequence."""

    sequence: Sequence
    first: int
    stride: int


class Unlike(NamedTuple):
    """The node that keeps something from being a loop, why, and the last state."""

    node: fx.Node
    reason: str
    last: fx.Node


@dataclass(frozen=True)
class Loop:
    """A loop whose steps are all the same.

    Attributes:
        states: those after every step, in the order in which they are computed.
        initial: the state before the first step.
        step: what a step computes.
        runs: the sequences of every :class:`Part`, by its number.
        nodes: all nodes of the steps, states and slices among them.
        shared: the nodes that steps share.
    """

    states: tuple[fx.Node, ...]
    initial: fx.Node | float
    step: Expression
    runs: tuple[Run, ...]
    nodes: frozenset[fx.Node]
    shared: frozenset[fx.Node]

    @property
    def needed(self) -> set[fx.Node]:
        """What has to be there before any state can be computed."""
        initial = {self.initial} if isinstance(self.initial, fx.Node) else set()
        return {*self.shared, *(run.sequence.source for run in self.runs), *initial}

    @property
    def begins_with_zeros(self) -> bool:
        """Whether the initial state is 0."""
        if not isinstance(self.initial, fx.Node):
            return self.initial == 0
        return name_of(self.initial) in ("zeros", "zeros_like", "new_zeros")

    @property
    def own_zeros(self) -> fx.Node | None:
        """The initial state, where it is zeros that nothing else uses."""
        if isinstance(self.initial, fx.Node) and self.begins_with_zeros and self.nodes.issuperset(self.initial.users):
            return self.initial
        return None


def read_way(way: Way, sliced: SlicedNodes, others: Set[fx.Node]) -> Loop | Unlike | None:
    """The loop on a way, or what keeps its steps from being one function; None if nothing moves along it.  ``others``
    are the states of other loops.

    The way may begin with what is made of the last state, by an operation that looks like one of the step: the last
    state is one of the nodes of the first period.
    """
    found = _read_from(way, sliced, others)
    for first in range(way.first + 1, way.first + way.period):
        if not isinstance(found, Unlike):
            return found
        later = _read_from(way._replace(first=first), sliced, others)
        found = later if isinstance(later, Loop) else found
    return found


def _read_from(way: Way, sliced: SlicedNodes, others: Set[fx.Node]) -> Loop | Unlike | None:
    """The same, with the last state where the way begins."""
    last, before = way.nodes[way.first], way.nodes[way.first + way.period]
    pattern = Pattern(last, before, sliced, {*way.nodes[way.first + way.period + 1 :], *others})
    if not pattern.sequences:
        return None
    if pattern.obstacle is not None:
        return Unlike(*pattern.obstacle, last)
    states: list[fx.Node] = []
    matches: list[Match] = []
    strides: dict[int, int] = {}
    state: fx.Node | float = last
    unlike = last
    while isinstance(state, fx.Node):
        match = pattern.compare(state)
        if match.unlike is not None or match.before is None:
            unlike = match.unlike or state
            break
        if matches:
            moved = {number: matches[-1].indices[number] - index for number, index in match.indices.items()}
            if strides and moved != strides:
                unlike = state
                break
            strides = moved
        states.append(state)
        matches.append(match)
        state = match.before
    if len(states) < MIN_STEPS:
        return Unlike(unlike, f"{unlike.name} is not the same function of its slices in this step as in the next", last)
    first = matches[-1]
    runs = tuple(
        Run(sequence, first.indices[number], strides[number]) for number, sequence in enumerate(pattern.sequences)
    )
    moving = moving_parts(runs)
    if not moving:
        return None
    return Loop(
        states=tuple(reversed(states)),
        initial=state,
        step=pattern.expression(first, moving),
        runs=runs,
        nodes=frozenset(node for match in matches for mine, node in match.nodes.items() if not sliced.is_shared(mine)),
        shared=frozenset(
            first.nodes[node] for node in first.nodes if sliced.is_shared(node) or _is_still(node, pattern, moving)
        ),
    )


def moving_parts(runs: tuple[Run, ...]) -> dict[int, int]:
    """Those that move through time, by their number, and the first that is the same: a slice that is taken twice is
    one."""
    return {number: runs.index(run) for number, run in enumerate(runs) if run.stride}


def _is_still(node: fx.Node, pattern: Pattern, moving: Mapping[int, int]) -> bool:
    number = pattern.part(node)
    return number is not None and number not in moving

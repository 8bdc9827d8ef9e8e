"""A loop's steps: proof that all are the same function of their own slices and of the state before.

The last step is the pattern, and every other one is compared with it, node by node.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import fx

from structfly.patterns.linear_recurrence.expressions import (
    Bounds,
    Expression,
    Number,
    Operation,
    Part,
    Shared,
    State,
)
from structfly.patterns.linear_recurrence.loops import MIN_STEPS, SlicedNodes, Way
from structfly.patterns.linear_recurrence.slices import Sequence
from structfly.rewriter.calls import read

LARGEST_STEP = 128
"""Operations of one step."""

_ARITHMETIC = ("add", "sub", "mul", "div", "lerp", "addcmul", "where", "masked_fill")


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
        return _name(self.initial) in ("zeros", "zeros_like", "new_zeros")

    @property
    def own_zeros(self) -> fx.Node | None:
        """The initial state, where it is zeros that nothing else uses."""
        if isinstance(self.initial, fx.Node) and self.begins_with_zeros and self.nodes.issuperset(self.initial.users):
            return self.initial
        return None


@dataclass
class Match:
    """What of a step stands where something of the pattern does.

    Attributes:
        before: the state that it takes, None if it takes none.
        nodes: its node for each of the pattern's.
        indices: those of its slices, in the pattern's order.
        unlike: the first node that has no counterpart.
    """

    before: fx.Node | float | None = None
    nodes: dict[fx.Node, fx.Node] = field(default_factory=dict)
    indices: dict[int, int] = field(default_factory=dict)
    unlike: fx.Node | None = None


class Pattern:
    """What one step computes from ``state``.

    Args:
        root, state: what it computes, and from what.
        taboo: states that it must not take.

    Attributes:
        sequences: what its slices are of, by the number of their :class:`Part`.
        obstacle: why it is not made of slices, shared values and that state alone, and the node that shows it.
    """

    def __init__(self, root: fx.Node, state: fx.Node, sliced: SlicedNodes, taboo: Set[fx.Node]) -> None:
        self._root, self._state, self._sliced = root, state, sliced
        self.sequences: list[Sequence] = []
        self._parts: dict[fx.Node, int] = {}
        self.obstacle: tuple[fx.Node, str] | None = None
        seen: set[fx.Node] = set()
        pending = [root]
        while pending and len(seen) <= LARGEST_STEP:
            node = pending.pop()
            if node in seen or node is state or sliced.is_shared(node):
                continue
            seen.add(node)
            if node in taboo:
                self.obstacle = (
                    node,
                    "a step takes more than the state before it: one of an earlier step, or another loop's",
                )
            elif len(seen) > LARGEST_STEP:
                self.obstacle = node, f"a step is made of more than {LARGEST_STEP} operations"
            elif node in sliced.slices:
                self._parts[node] = len(self.sequences)
                self.sequences.append(sliced.slices[node].sequence)
            else:
                pending.extend(node.all_input_nodes)

    def part(self, node: fx.Node) -> int | None:
        """The number of a slice of the pattern, None for other nodes."""
        return self._parts.get(node)

    def compare(self, root: fx.Node) -> Match:
        """Compare another step with this one."""
        match = Match()
        self._same(self._root, root, match)
        return match

    def _same(self, mine: fx.Node, other: fx.Node, match: Match) -> bool:
        if match.nodes.get(mine) is other:
            return True
        if mine is self._state:
            return self._is_before(other, match)
        if mine in self._parts:
            piece = self._sliced.slices.get(other)
            number = self._parts[mine]
            same = (
                piece is not None
                and piece.sequence == self.sequences[number]
                and match.indices.setdefault(number, piece.step) == piece.step
            )
        elif self._sliced.is_shared(mine):
            same = self._sliced.is_shared(other) and self._sliced.values.first(mine) is self._sliced.values.first(other)
        else:
            same = (
                mine.target == other.target
                and mine.op == other.op
                and self._alike(mine.args, other.args, match)
                and self._alike(mine.kwargs, other.kwargs, match)
            )
        if same:
            match.nodes[mine] = other
        elif match.unlike is None:
            match.unlike = other
        return same

    def _is_before(self, other: fx.Node | float, match: Match) -> bool:
        if match.before is None:
            match.before = other
        return match.before is other or (isinstance(other, (int, float)) and match.before == other)

    def _alike(self, mine: Any, other: Any, match: Match) -> bool:
        """Whether two arguments are the same, but for slices and the state."""
        if isinstance(mine, fx.Node):
            if isinstance(other, fx.Node):
                return self._same(mine, other, match)
            return mine is self._state and isinstance(other, (int, float)) and self._is_before(other, match)
        if type(mine) is not type(other):
            return False
        if isinstance(mine, (tuple, list)):
            return len(mine) == len(other) and all(
                self._alike(one, another, match) for one, another in zip(mine, other, strict=True)
            )
        if isinstance(mine, dict):
            return mine.keys() == other.keys() and all(self._alike(mine[key], other[key], match) for key in mine)
        if isinstance(mine, slice):
            return self._alike((mine.start, mine.stop, mine.step), (other.start, other.stop, other.step), match)
        return bool(mine == other)

    def expression(self, first: Match, moving: set[int]) -> Expression:
        """What a step computes; values that all share are those of the ``first`` step."""
        made: dict[fx.Node, Expression] = {}

        def of(node: fx.Node) -> Expression:
            if node not in made:
                made[node] = leaf(node)
            return made[node]

        def leaf(node: fx.Node) -> Expression:
            if node is self._state:
                return State()
            number = self._parts.get(node)
            if number is not None and number in moving:
                return Part(number)
            if number is not None or self._sliced.is_shared(node):
                return Shared(first.nodes[node])
            return operation(node, of)

        return of(self._root)


def operation(node: fx.Node, of: Any) -> Operation:
    """A node as an operation on the expressions that ``of`` gives for its operands."""
    call = read(node)
    if call is None:
        return Operation(_name(node), (("input", tuple(map(of, node.all_input_nodes))),), node)
    arithmetic = call.op in _ARITHMETIC

    def value(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return of(argument)
        if isinstance(argument, (tuple, list)):
            return tuple(map(value, argument))
        if isinstance(argument, slice):
            return Bounds(*map(value, (argument.start, argument.stop, argument.step)))
        if arithmetic and isinstance(argument, (int, float)) and not isinstance(argument, bool):
            return Number(argument)
        return argument

    return Operation(call.op, tuple((name, value(argument)) for name, argument in call.arguments.items()), node)


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def read_way(way: Way, sliced: SlicedNodes, others: Set[fx.Node]) -> Loop | Unlike | None:
    """The loop on a way, or what keeps its steps from being one function; None if nothing moves along it.  ``others``
    are the states of other loops."""
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
    moving = {number for number, stride in strides.items() if stride}
    if not moving:
        return None
    first = matches[-1]
    return Loop(
        states=tuple(reversed(states)),
        initial=state,
        step=pattern.expression(first, moving),
        runs=tuple(
            Run(sequence, first.indices[number], strides[number]) for number, sequence in enumerate(pattern.sequences)
        ),
        nodes=frozenset(node for match in matches for mine, node in match.nodes.items() if not sliced.is_shared(mine)),
        shared=frozenset(
            first.nodes[node] for node in first.nodes if sliced.is_shared(node) or _is_still(node, pattern, moving)
        ),
    )


def _is_still(node: fx.Node, pattern: Pattern, moving: set[int]) -> bool:
    number = pattern.part(node)
    return number is not None and number not in moving

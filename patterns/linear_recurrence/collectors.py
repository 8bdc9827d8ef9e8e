"""Where a loop's states go: into tensors of all steps, and to single users.

A collector joins one value of every step, a state or what the step makes of it: ``stack``, ``cat`` of single steps, or
writes into a tensor that was made for it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from torch import fx

from structfly.patterns.linear_recurrence.expressions import Expression, State, depends
from structfly.patterns.linear_recurrence.lifting import why_not_lifted
from structfly.patterns.linear_recurrence.loops import MIN_STEPS, SlicedNodes
from structfly.patterns.linear_recurrence.slices import read_slice
from structfly.patterns.linear_recurrence.step_pattern import Match, Pattern
from structfly.patterns.linear_recurrence.steps import Loop, Run, moving_parts
from structfly.rewriter.calls import Call
from structfly.rewriter.region import Region, example

_CREATORS = (
    "zeros_like",
    "ones_like",
    "full_like",
    "full",
    "empty",
    "empty_like",
    "zeros",
    "ones",
    "new_zeros",
    "new_empty",
)
_HIGHEST = 32
"""Operations between a state and the value of it that is collected."""


@dataclass(frozen=True)
class Collector:
    """A tensor of all steps.

    Attributes:
        node: what is replaced.
        dim: its time.
        kept: whether the values that are joined have a time, of one step.
        value: that of a step, with :class:`State` for the step's state.
        runs: the sequences of its parts.
        first, count, backward: the states are those from the loop's step ``first`` on, ``count`` of them, and whether
            they come in the opposite order.
        before, after: other values that are joined, in front and behind.
        nodes: it and all that is made for it alone.
        shared: nodes that are needed.
        writes: the writes that fill it, () for a join.
    """

    node: fx.Node
    dim: int
    kept: bool
    value: Expression
    runs: tuple[Run, ...]
    first: int
    count: int
    backward: bool
    before: tuple[fx.Node, ...]
    after: tuple[fx.Node, ...]
    nodes: frozenset[fx.Node]
    shared: frozenset[fx.Node]
    writes: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class _Join:
    """Values of steps that become one tensor, before it is known of which loop."""

    node: fx.Node
    dim: int
    kept: bool
    values: tuple[fx.Node, ...]
    writes: tuple[fx.Node, ...] = ()


class Joins:
    """The joins of a region."""

    def __init__(self, region: Region, sliced: SlicedNodes) -> None:
        self._region, self.sliced = region, sliced
        self._joins = [*self._of_lists(), *self._of_writes()]

    def _of_lists(self) -> Iterator[_Join]:
        for call in self._region.calls:
            if call.op in ("stack", "cat") and (join := self._list(call)) is not None:
                yield join

    def _list(self, call: Call) -> _Join | None:
        values, dim, tensor = call["tensors"], call.get("dim", 0), example(call.node)
        if (
            not isinstance(values, (tuple, list))
            or len(values) < MIN_STEPS
            or not isinstance(dim, int)
            or tensor is None
        ):
            return None
        dim %= tensor.ndim
        if call.op == "stack":
            return _Join(call.node, dim, False, tuple(values))
        parts = [example(value) for value in values]
        if all(part is not None and part.ndim == tensor.ndim and part.shape[dim] == 1 for part in parts):
            return _Join(call.node, dim, True, tuple(values))
        return None

    def _of_writes(self) -> Iterator[_Join]:
        written: dict[fx.Node, list[Call]] = defaultdict(list)
        for call in self._region.calls:
            if call.op == "setitem" and isinstance(call["input"], fx.Node):
                written[call["input"]].append(call)
        for target, calls in written.items():
            if len(calls) >= MIN_STEPS and (join := self._writes(target, calls)) is not None:
                yield join

    def _writes(self, target: fx.Node, calls: list[Call]) -> _Join | None:
        tensor = example(target)
        name = target.target if isinstance(target.target, str) else getattr(target.target, "__name__", "")
        if tensor is None or name not in _CREATORS:
            return None
        values: dict[int, fx.Node] = {}
        places = set()
        for call in calls:
            # What a write's index means is what the same index would read.
            place = read_slice(Call("getitem", call.node, {"input": target, "index": call["index"]}))
            value = example(call["value"])
            if place is None or not place.sequence.is_whole or value is None or place.step in values:
                return None
            places.add(place.sequence)
            if list(value.shape) != place.sequence.shape or value.dtype != tensor.dtype:
                return None
            values[place.step] = call["value"]
        order, writes = self._region.order, tuple(call.node for call in calls)
        last = max(map(order.__getitem__, writes))
        if len(places) != 1 or any(order[user] < last for user in target.users if user not in writes):
            return None
        (sequence,) = places
        if set(values) != set(range(tensor.shape[sequence.dim])):
            return None
        joined = tuple(values[index] for index in range(len(values)))
        return _Join(target, sequence.dim, sequence.place is not None, joined, writes)

    def of(self, loop: Loop) -> list[Collector]:
        """The collectors of a loop's states."""
        place = {state: step for step, state in enumerate(loop.states)}
        made = (self._collector(join, loop, place) for join in self._joins)
        return [each for each in made if each is not None]

    def _collector(self, join: _Join, loop: Loop, place: dict[fx.Node, int]) -> Collector | None:
        below = [self._state_below(value, place) for value in join.values]
        inside = [index for index, state in enumerate(below) if state is not None]
        if len(inside) < MIN_STEPS or inside != list(range(inside[0], inside[-1] + 1)):
            return None
        steps = [place[state] for state in below if state is not None]
        stride = steps[1] - steps[0]
        if abs(stride) != 1 or any(two - one != stride for one, two in pairwise(steps)):
            return None
        values = join.values[inside[0] : inside[-1] + 1]
        states = [state for state in below if state is not None]
        if stride < 0:
            values, states = values[::-1], states[::-1]
        pattern = Pattern(values[-1], states[-1], self.sliced, frozenset(place))
        if pattern.obstacle is not None:
            return None
        matches = [pattern.compare(value) for value in values]
        runs = _runs(pattern, matches, states)
        if runs is None:
            return None
        value = pattern.expression(matches[0], moving_parts(runs))
        if not depends(value, State()) or why_not_lifted(value) is not None:
            return None
        own = {node for match in matches for node in match.nodes.values() if not self.sliced.is_shared(node)}
        shared = {node for node in matches[0].nodes.values() if self.sliced.is_shared(node)}
        shared |= {match.nodes[node] for match in matches[:1] for node in match.nodes if pattern.part(node) is not None}
        return Collector(
            node=join.node,
            dim=join.dim,
            kept=join.kept,
            value=value,
            runs=runs,
            first=min(steps),
            count=len(steps),
            backward=stride < 0,
            before=join.values[: inside[0]],
            after=join.values[inside[-1] + 1 :],
            nodes=frozenset({join.node, *join.writes, *own}),
            shared=frozenset(shared),
            writes=join.writes,
        )

    def _state_below(self, node: fx.Node, place: dict[fx.Node, int]) -> fx.Node | None:
        for _ in range(_HIGHEST):
            if node in place:
                return node
            if node not in self.sliced.deepest:
                return None
            node = self.sliced.deepest[node]
        return None


def _runs(pattern: Pattern, matches: list[Match], states: list[fx.Node]) -> tuple[Run, ...] | None:
    """The sequences of the values' slices, or None if the values are not one function of state and slices."""
    if any(match.unlike is not None for match in matches):
        return None
    if any(match.before is not state for match, state in zip(matches, states, strict=True)):
        return None
    runs = []
    for number, sequence in enumerate(pattern.sequences):
        indices = [match.indices[number] for match in matches]
        stride = indices[1] - indices[0]
        if any(two - one != stride for one, two in pairwise(indices)):
            return None
        runs.append(Run(sequence, indices[0], stride))
    return tuple(runs)

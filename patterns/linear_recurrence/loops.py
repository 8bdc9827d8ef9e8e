"""Loops over time that tracing unrolled: where they are, before anything is proven.

The value that is made of slices in the most operations is the last state, and on the longest way down from it lie the
states before.  Such ways, each followed until it meets one that was followed before, cover all nodes that are made of
slices once; a loop is a part of one that repeats itself.  All of this is linear in the size of the graph.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

from torch import fx

from structfly.patterns.linear_recurrence.slices import Sequence, Slice, read_slice
from structfly.patterns.linear_recurrence.values import Values
from structfly.rewriter.calls import read
from structfly.rewriter.region import Region

MIN_STEPS = 4
"""Loops of fewer steps are not looked for."""
LONGEST_STEP = 64
"""Operations between a state and the next one."""


class Way(NamedTuple):
    """Part of a way that repeats itself.

    Attributes:
        nodes: from the last down.
        first: where it begins to repeat.
        period: operations from a state to the one before.
        end: where it ends.
    """

    nodes: list[fx.Node]
    first: int
    period: int
    end: int


class SlicedNodes:
    """The nodes of a region that are made of slices.

    Attributes:
        slices: the nodes that are slices, of tensors of which at least :data:`MIN_STEPS` steps are taken.
        depth: how many operations lie between a node and its slices, 0 where there are none.
        deepest: that operand of a node which has the largest depth.
    """

    def __init__(self, region: Region) -> None:
        self.region = region
        self.depth: dict[fx.Node, int] = {}
        self.deepest: dict[fx.Node, fx.Node] = {}
        self.slices = {
            call.node: piece
            for call in region.calls
            if call.op in ("getitem", "select", "narrow") and (piece := read_slice(call)) is not None
        }
        if len(self.slices) >= MIN_STEPS:
            self.values = Values(region)
            self.slices = self._of_many_steps()
            self._measure()

    def _of_many_steps(self) -> dict[fx.Node, Slice]:
        """The slices of which there are many, with the first node of the same value for the source."""
        steps: dict[Sequence, set[int]] = defaultdict(set)
        found: dict[fx.Node, Slice] = {}
        for node, (sequence, step) in self.slices.items():
            sequence = sequence._replace(source=self.values.first(sequence.source))
            found[node] = Slice(sequence, step)
            steps[sequence].add(step)
        return {node: piece for node, piece in found.items() if len(steps[piece.sequence]) >= MIN_STEPS}

    def is_shared(self, node: fx.Node) -> bool:
        """Whether a node is made of no slice."""
        return not self.depth.get(node)

    def _measure(self) -> None:
        depth = self.depth
        for node in self.region.graph.nodes:
            if node in self.slices and not depth.get(self.slices[node].sequence.source):
                depth[node] = 1
                continue
            self.slices.pop(node, None)  # a part of what a step has
            operand = max(node.all_input_nodes, key=lambda each: depth.get(each, 0), default=None)
            if operand is not None and depth.get(operand) and not self._collects(node):
                depth[node], self.deepest[node] = depth[operand] + 1, operand

    def _collects(self, node: fx.Node) -> bool:
        """Whether a node joins many steps, so that it is a whole tensor again."""
        call = read(node)
        return (
            call is not None
            and call.op in ("stack", "cat")
            and isinstance(call["tensors"], (tuple, list))
            and sum(bool(self.depth.get(each)) for each in call["tensors"]) >= MIN_STEPS
        )

    def ways(self) -> Iterator[Way]:
        """The parts of ways that repeat themselves."""
        seen: set[fx.Node] = set()
        for start in sorted(self.deepest, key=lambda node: self.depth[node], reverse=True):
            nodes: list[fx.Node] = []
            node: fx.Node | None = start
            while node is not None and node not in seen:
                seen.add(node)
                nodes.append(node)
                node = self.deepest.get(node)
            if len(nodes) >= MIN_STEPS:
                if node is not None:
                    nodes.append(node)
                yield from _repeating(
                    nodes, [self._looks(one, other) for one, other in zip(nodes, [*nodes[1:], None], strict=True)]
                )

    def _looks(self, node: fx.Node, below: fx.Node | None) -> Hashable:
        """What an operation on the way looks like, whatever its step."""

        def seen(value: Any) -> Hashable:
            if isinstance(value, fx.Node):
                if value is below:
                    return "way"
                if value in self.slices:
                    return self.slices[value].sequence
                return "step" if self.depth.get(value) else self.values.first(value)
            if isinstance(value, (tuple, list)):
                return tuple(map(seen, value))
            return repr(value)

        return (node.target, seen(node.args), seen(tuple(sorted(node.kwargs.items()))))


def _repeating(nodes: list[fx.Node], looks: list[Hashable]) -> Iterator[Way]:
    numbers: dict[Hashable, int] = {}
    way = [numbers.setdefault(each, len(numbers)) for each in looks]
    first = 0
    while first < len(way):
        period = _period(way, first)
        if not period:
            first += 1
            continue
        end = first + period
        while end < len(way) and way[end] == way[end - period]:
            end += 1
        yield Way(nodes, first, period, end)
        first = end


def _period(way: list[int], first: int) -> int:
    """After how many operations the way repeats itself from ``first`` on, 0 for never.

    A loop's first state may be made in another way than the others, so that one repetition less is asked for.
    """
    for period in range(1, LONGEST_STEP + 1):
        long = period * (MIN_STEPS - 2)
        if first + period + long > len(way):
            return 0
        if (
            way[first] == way[first + period]
            and way[first : first + long] == way[first + period : first + period + long]
        ):
            return period
    return 0

"""What one step computes, and the comparison of other steps with it, node by node."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from structfly.patterns.linear_recurrence.expressions import Expression, Part, Shared, State
from structfly.patterns.linear_recurrence.loops import SlicedNodes
from structfly.patterns.linear_recurrence.operations import operation
from structfly.patterns.linear_recurrence.slices import Sequence

LARGEST_STEP = 128
"""Operations of one step."""


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

    def expression(self, first: Match, parts: Mapping[int, int]) -> Expression:
        """What a step computes; values that all share are those of the ``first`` step, and ``parts`` are the numbers of
        the :class:`Part` that slices which move through time become."""
        made: dict[fx.Node, Expression] = {}

        def of(node: fx.Node) -> Expression:
            if node not in made:
                made[node] = leaf(node)
            return made[node]

        def leaf(node: fx.Node) -> Expression:
            if node is self._state:
                return State()
            number = self._parts.get(node)
            if number is not None and number in parts:
                return Part(parts[number])
            if number is not None or self._sliced.is_shared(node):
                return Shared(first.nodes[node])
            return operation(node, of)

        return of(self._root)

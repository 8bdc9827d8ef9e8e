"""The recurrence as found: what the rule binds before anything is decided."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import sympy
from torch import fx

from structfly.patterns.linear_recurrence.collectors import Collector
from structfly.patterns.linear_recurrence.recurrence import Recurrence
from structfly.patterns.linear_recurrence.steps import Loop
from structfly.records import Site, Stage


@dataclass(frozen=True)
class RecurrenceSite(Site):
    """A recurrence, however it is written.

    Attributes:
        recurrence: what the op is to compute, or the first of what it is.
        kept: the kernels of the graph as it is.
        steps: how many steps there are.
    """

    recurrence: Recurrence
    kept: tuple[Stage, ...] = field(repr=False)
    steps: sympy.Expr | int

    @property
    def values_only(self) -> bool:
        return True

    @property
    def recurrences(self) -> tuple[Recurrence, ...]:
        """All that the op is to compute, a call each."""
        return (self.recurrence,)

    @property
    def settled(self) -> str:
        """Why the graph must not stay as it is, or ""."""
        return ""


@dataclass(frozen=True)
class LoopSite(RecurrenceSite):
    """A loop over time whose state is affine in the state before.

    Attributes:
        loop: its steps.
        collectors: the tensors that the states go into.
    """

    loop: Loop
    collectors: tuple[Collector, ...]

    @cached_property
    def own(self) -> frozenset[fx.Node]:
        """The nodes of steps and collectors, but for what others use of a step and what that is made of."""
        states = set(self.loop.states)
        own = set(self.loop.nodes).union(*(each.nodes for each in self.collectors))
        ends = states.union(*((each.node, *each.writes) for each in self.collectors))
        pending = [node for node in own - ends if not own.issuperset(node.users)]
        while pending:
            node = pending.pop()
            if node in own and node not in states:
                own.remove(node)
                pending.extend(node.all_input_nodes)
        return frozenset(own)

    @property
    def dead_nodes(self) -> tuple[fx.Node, ...]:
        nodes = dict.fromkeys(self.own)
        if self.loop.own_zeros is not None:
            nodes[self.loop.own_zeros] = None
        return tuple(nodes)

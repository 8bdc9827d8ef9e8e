"""The recurrence as found: what the rule binds before anything is decided."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import sympy
import torch
from torch import fx

from structfly.patterns.linear_recurrence.affine import Affine
from structfly.patterns.linear_recurrence.collectors import Collector
from structfly.patterns.linear_recurrence.steps import Loop
from structfly.records import Site


@dataclass(frozen=True)
class LoopSite(Site):
    """A loop over time whose state is affine in the state before.

    Attributes:
        loop: its steps.
        step: what one does.
        collectors: the tensors that the states go into.
        dtype: of the states.
        rank: how many dimensions a state has.
        numbers: how many numbers a state has.
        gradient: whether a gradient is needed.
        autocast: whether it runs under autocast, so that examples do not tell the dtype of products.
    """

    loop: Loop
    step: Affine
    collectors: tuple[Collector, ...]
    dtype: torch.dtype
    rank: int
    numbers: sympy.Expr = field(repr=False)
    gradient: bool
    autocast: bool

    @cached_property
    def own(self) -> frozenset[fx.Node]:
        """The nodes of steps and collectors, but for what others use of a step and what that is made of."""
        states = set(self.loop.states)
        own = set(self.loop.nodes).union(*(each.nodes for each in self.collectors))
        pending = [node for node in self.loop.nodes - states if not own.issuperset(node.users)]
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

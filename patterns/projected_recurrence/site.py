"""A linear with the recurrence of what it makes, as found."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from structfly.patterns.projected_recurrence.projections import Projection
from structfly.patterns.projected_recurrence.recurrences import RecurrenceCall
from structfly.patterns.projected_recurrence.windows import Windows
from structfly.records import Site
from structfly.records.cost import Expression


@dataclass(frozen=True)
class ProjectedSite(Site):
    """A call of a recurrence's op that takes all that a linear makes, and nothing else does; ``node`` is the call.

    Attributes:
        call: the call.
        projection: the linear, and how it gets there.
        windows: what the linear takes, where that is windows over time, or None.
        dtype: of what the linear makes.
        slower: why one kernel does not do it, or would not do it faster, or "".
        steps: of all sequences.
        inner, outer: numbers that the linear takes and makes at each.
        seen: numbers that windows are written of, 0 where none are, or others read them.
    """

    call: RecurrenceCall
    projection: Projection
    windows: Windows | None
    dtype: torch.dtype
    slower: str
    steps: Expression
    inner: Expression
    outer: Expression
    seen: Expression

    @property
    def dead_nodes(self) -> tuple[fx.Node, ...]:
        nodes = (self.node, *self.projection.nodes)
        return nodes if self.windows is None or not self.seen else (*nodes, *self.windows.nodes)

    @property
    def groups(self) -> tuple[tuple[fx.Node, ...], ...]:
        """What windows are of is read where the call stands, though others may read the windows before."""
        windows = () if self.windows is None else self.windows.nodes
        return (tuple(dict.fromkeys((*self.dead_nodes, *windows))),)

"""The divergence as found: what the rule binds before anything is decided."""

from __future__ import annotations

from dataclasses import dataclass, field

import sympy
import torch
from torch import fx

from structfly.patterns.head.path import LogitsPath
from structfly.patterns.head.site import HeadSite
from structfly.patterns.head.weighted_sum import WeightedSum
from structfly.patterns.linear_divergence.kinds import Kind
from structfly.patterns.linear_divergence.readings import Divergence
from structfly.patterns.linear_divergence.teacher import GivenTeacher, teacher_dtype


@dataclass(frozen=True)
class DivergenceSite(HeadSite):
    """A student's linear, a teacher, and the divergence that the student's logits feed.

    Attributes:
        anchor: the node that is ``divergence``.
        divergence: how it was read.
        kind: which divergence that is.
        total: set if the divergences of rows, or their terms, end in a weighted sum.
        teacher: the way from the teacher's linear to its softmax, or the tensor that is given.
        teacher_bytes: bytes that one of the teacher's entries takes in a chunk; 0 for rows that are read as they lie.
        teacher_hidden: the teacher's own H, 0 for one that is given.
    """

    anchor: fx.Node
    divergence: Divergence
    kind: Kind
    total: WeightedSum | None
    teacher: LogitsPath | GivenTeacher
    teacher_bytes: int
    teacher_hidden: sympy.Expr = field(repr=False)

    @property
    def kind_name(self) -> str:
        return self.kind.kind

    @property
    def teacher_given(self) -> bool:
        return isinstance(self.teacher, GivenTeacher)

    @property
    def teacher_dtype(self) -> torch.dtype:
        return teacher_dtype(self.teacher)

    @property
    def dead_nodes(self) -> tuple[fx.Node, ...]:
        nodes = dict.fromkeys((*self.path.nodes, *self.teacher.nodes, *self.divergence.nodes))
        if self.total is not None:
            nodes.update(dict.fromkeys(self.total.nodes))
        return tuple(nodes)

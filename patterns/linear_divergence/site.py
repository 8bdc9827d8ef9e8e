"""The divergence as found: what the rule binds before anything is decided."""

from __future__ import annotations

from dataclasses import dataclass, field

import sympy
import torch
from torch import fx

from structfly.lowering.head.linear import Wanted
from structfly.patterns.linear_cross_entropy.logits import LogitsPath
from structfly.patterns.linear_cross_entropy.weighted_sum import WeightedSum
from structfly.patterns.linear_divergence.kinds import Kind
from structfly.patterns.linear_divergence.readings import Divergence
from structfly.patterns.linear_divergence.teacher import GivenTeacher
from structfly.records import Site


@dataclass(frozen=True)
class DivergenceSite(Site):
    """A student's linear, a teacher, and the divergence that the student's logits feed.

    Attributes:
        anchor: the node that is ``divergence``.
        divergence: how it was read.
        kind: which divergence that is.
        path: from the student's linear to its softmax.
        teacher: the way from the teacher's linear to its softmax, or the tensor that is given.
        teacher_bytes: bytes that one of the teacher's entries takes in a chunk; 0 for rows that are read as they lie.
        total: set if the divergence of every row ends in a weighted sum.
        gradients: which of the student's operands need one.
        recompute: gradients cannot or should not be made in the forward pass.
        rows, hidden, classes, rank: N, H, C and the student's adapter's R (0 without one).
        teacher_hidden: the teacher's own H, 0 for one that is given.
        dtype: of the student's logits: what its matrix products run in.
        loss_dtype: of the value that is replaced.
    """

    anchor: fx.Node
    divergence: Divergence
    kind: Kind
    path: LogitsPath
    teacher: LogitsPath | GivenTeacher
    teacher_bytes: int
    total: WeightedSum | None
    gradients: Wanted
    recompute: str
    rows: sympy.Expr = field(repr=False)
    hidden: sympy.Expr = field(repr=False)
    classes: sympy.Expr = field(repr=False)
    rank: sympy.Expr = field(repr=False)
    teacher_hidden: sympy.Expr = field(repr=False)
    dtype: torch.dtype
    loss_dtype: torch.dtype

    @property
    def dead_nodes(self) -> tuple[fx.Node, ...]:
        nodes = dict.fromkeys((*self.path.nodes, *self.teacher.nodes, *self.divergence.nodes))
        if self.total is not None:
            nodes.update(dict.fromkeys(self.total.nodes))
        return tuple(nodes)

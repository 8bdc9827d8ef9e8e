"""The head as found: what the rule binds before anything is decided."""

from __future__ import annotations

from dataclasses import dataclass, field

import sympy
import torch
from torch import fx

from structfly.lowering.head.linear import Wanted
from structfly.patterns.linear_cross_entropy.logits import LogitsPath
from structfly.patterns.linear_cross_entropy.loss import LossForm
from structfly.patterns.linear_cross_entropy.pieces import Pieces
from structfly.patterns.linear_cross_entropy.weighted_sum import WeightedSum
from structfly.records import Site


@dataclass(frozen=True)
class HeadSite(Site):
    """A linear and the loss, or the losses of its pieces, that its logits feed.

    Attributes:
        path: from the linear to the (first) loss.
        form: the (first) loss.
        pieces: set if the rows are split over several losses.
        total: set if per-token losses end in a weighted sum.
        gradients: which of the linear's operands need one.
        recompute: gradients cannot or should not be made in the forward pass.
        rows, hidden, classes, rank: N, H, C and the adapter's R (0 without one).
        dtype: of the logits: what the matrix products run in.
        loss_dtype: of the value that is replaced.
    """

    path: LogitsPath
    form: LossForm
    pieces: Pieces | None
    total: WeightedSum | None
    gradients: Wanted
    recompute: str
    rows: sympy.Expr = field(repr=False)
    hidden: sympy.Expr = field(repr=False)
    classes: sympy.Expr = field(repr=False)
    rank: sympy.Expr = field(repr=False)
    dtype: torch.dtype
    loss_dtype: torch.dtype

    @property
    def reduction(self) -> str:
        """The op's reduction."""
        if self.pieces is not None:
            return "none"
        return "sum" if self.total is not None else self.form.reduction

    @property
    def dead_nodes(self) -> tuple[fx.Node, ...]:
        nodes = dict.fromkeys(self.path.nodes)
        if self.pieces is not None:
            for piece in self.pieces.members:
                nodes.update(dict.fromkeys((*piece.path.nodes, piece.form.anchor)))
        if self.total is not None:
            nodes.update(dict.fromkeys(self.total.nodes))
        return (*nodes, *self.form.inner, self.form.anchor)

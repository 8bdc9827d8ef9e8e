"""The loss head as found: what the rule binds before anything is decided."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from structfly.patterns.head.site import HeadSite
from structfly.patterns.linear_cross_entropy.loss import LossForm
from structfly.patterns.linear_cross_entropy.pieces import Pieces


@dataclass(frozen=True)
class CrossEntropySite(HeadSite):
    """A linear and the loss, or the losses of its pieces, that its logits feed.

    Attributes:
        form: the (first) loss.
        pieces: set if the rows are split over several losses.
    """

    form: LossForm
    pieces: Pieces | None

    @property
    def label_smoothing(self) -> float:
        return self.form.label_smoothing

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

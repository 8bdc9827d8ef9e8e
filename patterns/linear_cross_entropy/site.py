"""The loss head as found: what the rule binds before anything is decided."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from structfly.patterns.head.site import HeadSite
from structfly.patterns.linear_cross_entropy.loss import LossForm
from structfly.patterns.linear_cross_entropy.pieces import Pieces
from structfly.patterns.linear_cross_entropy.row_loss import RowLoss
from structfly.patterns.linear_cross_entropy.same_rows import SameRows


@dataclass(frozen=True)
class CrossEntropySite(HeadSite):
    """A linear and what its logits feed: a loss, losses of its pieces, statistics of its rows.

    Attributes:
        form: the loss (of the first piece), or None if only statistics are wanted.
        pieces: set if the rows are split over several losses, else ``same`` is.
        same: the consumers of the same rows.
    """

    form: LossForm | None
    pieces: Pieces | None
    same: SameRows | None

    @property
    def reduction(self) -> str:
        """The op's reduction."""
        return "none" if self.same is None else self.same.reduction

    @property
    def statistics(self) -> tuple[str, ...]:
        """What the op returns beside its loss."""
        return () if self.same is None else self.same.statistics

    @property
    def row_loss(self) -> RowLoss | None:
        """The program that makes a row's loss, where the op runs one."""
        return None if self.same is None else self.same.row_loss

    @property
    def row_program(self) -> str:
        """The same as the op takes it, or ""."""
        return "" if self.row_loss is None else self.row_loss.program

    @property
    def group_rows(self) -> int:
        """How many rows make a group of the program's, at the example's sizes."""
        return 1 if self.row_loss is None else self.row_loss.axes.group_rows

    @property
    def regrouped(self) -> bool:
        """Whether the op takes the rows in another order than the user's."""
        return self.row_loss is not None and self.row_loss.axes.moves

    @property
    def consumers(self) -> int:
        """How many read the logits."""
        return 1 if self.same is None else len(self.same.consumers)

    @property
    def outputs(self) -> tuple[str, ...]:
        loss = ("loss",) if self.form is not None or self.row_loss is not None else ()
        return (*loss, *self.statistics)

    @property
    def label_smoothing(self) -> float:
        """The loss's."""
        return 0.0 if self.form is None else self.form.label_smoothing

    @property
    def ends(self) -> tuple[fx.Node, ...]:
        """The nodes whose values something else may use."""
        if self.pieces is not None:
            return tuple(member.form.anchor for member in self.pieces.members)
        return () if self.same is None else tuple(self.same.end(form) for _, form in self.same.consumers)

    @property
    def inputs(self) -> frozenset[fx.Node]:
        """What has to exist where the op stands."""
        dead = set(self.dead_nodes)
        summed = set() if self.row_loss is None else set(self.row_loss.nodes)
        given = () if self.row_loss is None else self.row_loss.inputs
        return frozenset((*given, *(operand for node in dead - summed for operand in node.all_input_nodes))) - dead

    @property
    def dead_nodes(self) -> tuple[fx.Node, ...]:
        nodes = dict.fromkeys(self.path.nodes)
        if self.pieces is not None:
            for member in self.pieces.members:
                nodes.update(dict.fromkeys((*member.path.nodes, *member.form.inner, member.form.anchor)))
            nodes.update(dict.fromkeys(self.pieces.moved))
        if self.same is not None:
            nodes.update(dict.fromkeys((*self.same.own, *self.same.moved)))
        return tuple(nodes)

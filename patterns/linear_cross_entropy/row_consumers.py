"""Consumers of logits at the start of a row program: statistics and losses in terms of the op's statistics."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from structfly.patterns.linear_cross_entropy.consumers import StatisticForm
from structfly.patterns.linear_cross_entropy.loss import LossForm
from structfly.patterns.linear_cross_entropy.program_writer import ProgramWriter
from structfly.patterns.linear_cross_entropy.row_axes import Axis, OfConsumer, RowAxes, Size, leaves_of
from structfly.patterns.linear_cross_entropy.row_loss import LiveRows, MeanDivisor
from structfly.patterns.linear_cross_entropy.row_values import RowValue, reshaped_rows
from structfly.rewriter.region import example_of, needs_gradient


@dataclass(frozen=True)
class RowConsumer:
    """A consumer whose value, at ``anchor``, is a statistic of each row, or a loss.

    Attributes:
        column: that of ``chosen`` which it reads, or None.
    """

    anchor: fx.Node
    form: LossForm | StatisticForm
    column: int | None

    @property
    def sizes(self) -> list[Size]:
        """The shape in which it has the rows."""
        form = self.form
        sizes: list[Size] = list(example_of(form.target if isinstance(form, LossForm) else self.anchor).shape)
        if isinstance(form, LossForm) and form.target_dim is not None:
            del sizes[form.target_dim]
        return sizes

    def axes(self) -> RowAxes:
        """The axes of all rows, one for each of its dimensions."""
        sizes = enumerate(self.sizes)
        return RowAxes(tuple(Axis(size, OfConsumer(self.anchor, dim)) for dim, size in sizes if size != 1))

    def value(self, rows: RowAxes, writer: ProgramWriter) -> RowValue:
        """Its value; :class:`NoProgramError` where the places of its rows among ``rows`` are not known."""
        form = self.form
        dims = reshaped_rows(self.anchor, (rows.given,), self.sizes, lambda dim: OfConsumer(self.anchor, dim))
        token = self._statistic(form, writer) if isinstance(form, StatisticForm) else self._loss(form, writer)
        if form.negated:
            token = writer.emit("neg", token)
        summed = isinstance(form, LossForm) and form.reduction != "none"
        if isinstance(form, LossForm) and form.reduction == "mean":
            token = writer.emit("div", token, writer.operand(MeanDivisor(form)))
        live = needs_gradient(self.anchor)
        if not live and token != "argmax":
            token = writer.emit("detach", token)
        return RowValue(token, () if summed else dims, leaves_of(dims) if summed else (), summed, live)

    def _loss(self, form: LossForm, writer: ProgramWriter) -> str:
        """The loss of a row; of all losses but one, -log p of the class that it names."""
        if self.column is None:
            return "loss"
        token = writer.emit("sub", "lse", f"chosen{self.column}")
        if form.ignore_index is not None:
            token = writer.emit("where", writer.operand(LiveRows(form)), token, "0.0")
        return token

    def _statistic(self, form: StatisticForm, writer: ProgramWriter) -> str:
        if form.kind == "chosen":
            return f"chosen{self.column}"
        return writer.emit("sub", "lse", "entropy") if form.kind == "mean_logit" else form.kind

"""Several consumers of the same rows of logits: one loss, further losses, and statistics, from one op.

The op stands before the first value that something else uses, and where gradients are recorded if one is
differentiated; what it takes has to exist by then, or to be such that it can be computed earlier.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from structfly.patterns.head.chain import TensorOperand
from structfly.patterns.head.gradients import carries_gradient
from structfly.patterns.head.path import LogitsPath
from structfly.patterns.head.weighted_sum import WeightedSum, read_weighted_sum
from structfly.patterns.linear_cross_entropy.consumers import StatisticForm
from structfly.patterns.linear_cross_entropy.loss import LossForm
from structfly.patterns.linear_cross_entropy.mean import live_rows, mean_divisor
from structfly.patterns.linear_cross_entropy.row_loss import NoRowLoss, RowLoss
from structfly.patterns.linear_cross_entropy.row_reader import read_row_loss
from structfly.rewriter.editor import Editor
from structfly.rewriter.region import Region, example_of
from structfly.rewriter.writes import why_late

Traced = tuple[LogitsPath, LossForm | StatisticForm]


@dataclass(frozen=True)
class SameRows:
    """Consumers of the same rows.

    Attributes:
        loss: the loss that the op makes as such, or None.
        others: all other consumers.
        path: the way to the first of all in the graph.
        total: set if the loss is per-token losses that end in a weighted sum (coefficient class A).
        row_loss: set if differentiated consumers end in a sum over rows or groups of rows (classes B and C).
        carrying: the ends through which gradients come back.
        place: the node before which the op has to stand.
        moved: nodes that the op needs and that stand later, in the order of the graph.
    """

    loss: tuple[LogitsPath, LossForm] | None
    others: tuple[Traced, ...]
    path: LogitsPath
    total: WeightedSum | None = None
    row_loss: RowLoss | None = None
    carrying: frozenset[fx.Node] = frozenset()
    place: fx.Node | None = None
    moved: tuple[fx.Node, ...] = ()

    @property
    def consumers(self) -> tuple[Traced, ...]:
        """All of them, the loss first."""
        return self.others if self.loss is None else (self.loss, *self.others)

    @property
    def columns(self) -> dict[int, int]:
        """The column of the op's choices for each consumer that has one, by its place in ``consumers``."""
        first = len(self.consumers) - len(self.others)
        with_index = [place for place, (_, form) in enumerate(self.others, first) if index_of(form) is not None]
        return {place: column for column, place in enumerate(with_index)}

    def end(self, form: LossForm | StatisticForm) -> fx.Node:
        """The node whose value is replaced for a consumer."""
        whole = self.total is not None and self.loss is not None and form is self.loss[1]
        return self.total.root if whole and self.total is not None else form.anchor

    @property
    def scalar(self) -> tuple[fx.Node, ...]:
        """The nodes from consumers to the scalar that the op gives, where it gives one of more than one node."""
        if self.row_loss is not None:
            return self.row_loss.nodes
        return () if self.total is None else self.total.nodes

    @property
    def own(self) -> frozenset[fx.Node]:
        """What is computed by the op: consumers, what stands before them, and what makes the scalar of them."""
        parts = [(*path.nodes, *form.inner, form.anchor) for path, form in self.consumers]
        return frozenset(node for part in (*parts, self.scalar) for node in part)

    @property
    def kept(self) -> tuple[Traced, ...]:
        """The consumers whose values something needs that does not go with the logits."""
        gone = set(self.own)
        if self.row_loss is not None:  # what of it serves something else stays
            gone -= set(self.row_loss.nodes)
            gone.add(self.row_loss.root)
            for node in reversed(self.row_loss.nodes):
                if gone.issuperset(node.users):
                    gone.add(node)
        return tuple(item for item in self.consumers if not gone.issuperset(self.end(item[1]).users))

    @property
    def reduction(self) -> str:
        """The op's reduction."""
        if self.row_loss is not None:
            return "sum"
        if self.loss is None:
            return "none"
        return self.loss[1].reduction if self.total is None else "sum"

    @property
    def statistics(self) -> tuple[str, ...]:
        """What the op returns beside its loss."""
        names: set[str] = set()
        for item in self.kept:
            if item is not self.loss:
                names.update(("lse", "chosen") if isinstance(item[1], LossForm) else item[1].statistics)
            elif self.row_loss is not None:
                names.add("losses")
        return tuple(sorted(names))


def index_of(form: LossForm | StatisticForm) -> fx.Node | None:
    """The classes a consumer names."""
    return form.target if isinstance(form, LossForm) else form.index


def without_served(traced: Sequence[Traced]) -> list[Traced]:
    """The consumers less those that only serve others: the logsumexp of a difference that is read as a whole."""
    kept = list(traced)
    for item in traced:
        form = item[1]
        rest = [other for other in kept if other is not item]
        own = {node for p, f in rest for node in (*p.nodes, *f.inner, f.anchor)}
        if isinstance(form, StatisticForm) and form.anchor in own and own.issuperset(form.anchor.users):
            kept = rest
    return kept


def read_same_rows(traced: Sequence[Traced], region: Region) -> SameRows | tuple[fx.Node, str]:
    """Put the consumers together, or say why they cannot be, and where."""
    order = region.order
    traced = sorted(traced, key=lambda item: order[item[1].anchor])
    first = traced[0][0]
    for path, form in traced:
        if path.transform != first.transform:
            return form.anchor, "consumers of the logits scale or mask them differently"
        if path.rows != first.rows:
            return form.anchor, "consumers of the logits take different rows, or in another order"
    losses = [(path, form) for path, form in traced if isinstance(form, LossForm)]
    losses.sort(key=lambda item: _preference(item[1], region))
    others = tuple(item for item in traced if not losses or item[1] is not losses[0][1])
    for _, form in others:
        if isinstance(form, LossForm) and (form.label_smoothing or form.class_weight is not None):
            return form.anchor, "several losses on the same logits, more than one with class weights or label smoothing"
    same = SameRows(losses[0] if losses else None, others, first)
    total = read_weighted_sum(losses[0][1].anchor) if losses and losses[0][1].reduction == "none" else None
    if total is not None:
        whole = _placed(replace(same, total=total), total.operands, region)
        if isinstance(whole, SameRows):
            return whole
    placed = _placed(same, (), region)
    if isinstance(placed, SameRows):
        return placed
    return placed[1], (
        f"{placed[0].name}, which {placed[1].name} needs, is made after another value of these logits was used; "
        "make it before"
    )


def read_scalar(same: SameRows, region: Region) -> SameRows | NoRowLoss:
    """The same consumers with the scalar that they end in, if that is a sum over rows or groups of rows."""
    same = replace(same, total=None)
    ends = [(form.anchor, form) for _, form in same.consumers]
    found = read_row_loss(ends, same.columns, region)
    if isinstance(found, NoRowLoss):
        return found
    placed = _placed(replace(same, row_loss=found), found.inputs, region)
    if isinstance(placed, SameRows):
        return placed
    late = f"{placed[0].name}, which {found.root.name} needs, is made after a statistic was used"
    return NoRowLoss(found.coefficient_class, late)


def _preference(form: LossForm, region: Region) -> tuple[bool, bool, bool]:
    """The op's own loss is the one that only it can make, else one that is differentiated and summed by it."""
    plain = not form.label_smoothing and form.class_weight is None
    return plain, not carries_gradient(form.anchor, region), form.reduction == "none"


def _placed(same: SameRows, inputs: Iterable[fx.Node], region: Region) -> SameRows | tuple[fx.Node, fx.Node]:
    """With its place, or what is made too late to be an input, and the node that needs it."""
    ends = [same.end(form) for _, form in same.consumers]
    kept = [same.end(form) for _, form in same.kept]
    kept += [] if same.row_loss is None else [same.row_loss.root]
    last = max([*ends, *same.scalar[-1:]], key=region.order.__getitem__)
    own = same.own
    gone = own if same.row_loss is None else own.difference(same.row_loss.nodes)
    users = [user for end in kept for user in end.users if user not in gone]
    place = min((*users, last), key=region.order.__getitem__)
    carrying = frozenset(end for end in ends if carries_gradient(end, region))
    if carrying:
        place = region.last_with_gradients(place)
    needed = [(node, last) for node in inputs]
    chain = (operand.node for operand in same.path.chain.operands if isinstance(operand, TensorOperand))
    needed.extend((node, ends[0]) for node in (*chain, same.path.bias) if node is not None)
    for _, form in same.consumers:
        given = (index_of(form), form.class_weight if isinstance(form, LossForm) else None)
        needed.extend((node, form.anchor) for node in given if node is not None)
    moved: set[fx.Node] = set()
    for node, reader in needed:
        late = why_late(region, node, place, own, moved)
        if late is not None:
            return late, reader
    return replace(same, carrying=carrying, place=place, moved=tuple(sorted(moved, key=region.order.__getitem__)))


# ------------------------------------------------------------------------------------------------ writing


def choices(same: SameRows, editor: Editor) -> fx.Node | None:
    """The op's choices, (N, K), made where the editor stands."""
    columns = []
    for place in same.columns:
        form = same.consumers[place][1]
        index = index_of(form)
        assert index is not None
        column = editor.call(torch.reshape, index, (-1,))
        if isinstance(form, LossForm) and form.ignore_index is not None:
            column = editor.call(torch.where, live_rows(form, editor), column, 0)
        columns.append(column if example_of(column).dtype == torch.int64 else editor.method("to", column, torch.int64))
    return editor.call(torch.stack, tuple(columns), 1) if columns else None


def values(same: SameRows, made: dict[str, fx.Node], place: int, editor: Editor) -> fx.Node:
    """The value of every row (N,) of the consumer at ``place``, or its reduced loss (), from what the op returned."""
    form = same.consumers[place][1]
    if isinstance(form, LossForm):
        if same.loss is not None and form is same.loss[1]:
            losses = made["losses"]
        else:
            chosen = editor.call(torch.select, made["chosen"], 1, same.columns[place])
            losses = editor.call(torch.sub, made["lse"], chosen)
            if form.ignore_index is not None:
                losses = editor.call(torch.where, live_rows(form, editor), losses, 0.0)
        if form.reduction != "none":
            losses = editor.call(torch.sum, losses)
        if form.reduction == "mean":
            losses = editor.call(torch.div, losses, mean_divisor(form, editor))
        return editor.call(torch.neg, losses) if form.negated else losses
    if form.kind == "chosen":
        return editor.call(torch.select, made["chosen"], 1, same.columns[place])
    value = made.get(form.kind)
    if value is None:  # the expected logit
        value = editor.call(torch.sub, made["lse"], made["entropy"])
    return editor.call(torch.neg, value) if form.negated else value

"""Writing the fused head into the graph."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from structfly.lowering.linear_cross_entropy.arguments import Arguments
from structfly.patterns.head.logits import example_of
from structfly.patterns.head.menu import FusedCandidate
from structfly.patterns.head.operands import cast, chain_operand, class_bias, class_rows, matrix, moved_rows
from structfly.patterns.head.weighted_sum import Weights, write_weights
from structfly.patterns.linear_cross_entropy.pieces import part_losses, whole_target
from structfly.patterns.linear_cross_entropy.site import CrossEntropySite
from structfly.rewriter.editor import Editor
from structfly.rewriter.views import RowView


def rewrite_head(site: CrossEntropySite, candidate: FusedCandidate, editor: Editor) -> None:
    """Insert the op before the loss, let the loss's users use it, and remove the logits."""
    if site.form.target_dim is not None:
        rows = editor.call(torch.squeeze, site.form.target, site.form.target_dim)
        site = replace(site, form=replace(site.form, target=rows))
    if site.pieces is not None:
        _rewrite_pieces(site, candidate, editor)
    elif site.total is not None:
        editor.before(site.total.root)
        weights = write_weights(site.total, site.form.target, editor)
        loss = _op(site, candidate, editor, _hidden(site, site.path.views, editor), site.form.target, weights.rows)
        editor.replace(site.total.root, _finish(site, loss, weights, editor))
    else:
        loss = _op(site, candidate, editor, _hidden(site, site.path.views, editor), site.form.target, None)
        if site.reduction == "none":
            loss = editor.method("reshape_as", loss, site.form.target)
        editor.replace(site.form.anchor, editor.call(torch.neg, loss) if site.form.negated else loss)
    editor.erase(site.dead_nodes)


def _finish(site: CrossEntropySite, loss: fx.Node, weights: Weights, editor: Editor) -> fx.Node:
    constant = -weights.constant if site.form.negated else weights.constant
    if constant != 1.0:
        loss = editor.call(torch.mul, loss, constant)
    if weights.count is not None:
        loss = editor.call(torch.div, loss, weights.count)
    return loss


def _rewrite_pieces(site: CrossEntropySite, candidate: FusedCandidate, editor: Editor) -> None:
    pieces = site.pieces
    assert pieces is not None
    rows = _hidden(site, site.path.views[: pieces.shared_views], editor)
    target = whole_target(pieces, rows, editor)
    losses = _op(site, candidate, editor, rows, target, None)
    losses = editor.method("reshape_as", losses, target)
    for member in pieces.members:
        editor.before(member.form.anchor)
        loss = part_losses(pieces, member, losses, editor)
        loss = editor.method("to", loss, example_of(member.form.anchor).dtype)
        editor.replace(member.form.anchor, editor.call(torch.neg, loss) if member.form.negated else loss)


def _hidden(site: CrossEntropySite, views: tuple[RowView, ...], editor: Editor) -> fx.Node:
    return moved_rows(site.path.linear.x, views, site.dtype, editor)


def _op(
    site: CrossEntropySite,
    candidate: FusedCandidate,
    editor: Editor,
    rows: fx.Node,
    target: fx.Node,
    row_weight: fx.Node | None,
) -> fx.Node:
    """The op's loss for hidden states ``rows`` of shape (..., H) and targets of as many entries."""
    path = site.path
    linear, adapter = path.linear, path.linear.adapter
    views = path.views if site.pieces is None else path.views[: site.pieces.shared_views]
    weight = class_rows(linear, site.dtype, editor)
    classes: int | fx.Node = editor.size(weight, 0) if path.num_classes is None else path.num_classes
    adapter_x = None if adapter is None else matrix(moved_rows(adapter.x, views, site.dtype, editor), editor)
    adapter_weight = None if adapter is None else class_rows(adapter, site.dtype, editor)
    target = editor.call(torch.reshape, target, (-1,))
    operands = [chain_operand(o, path, views, weight, classes, site.dtype, editor) for o in path.chain.operands]
    arguments = Arguments(
        x=matrix(rows, editor),  # type: ignore[arg-type]
        weight=weight,  # type: ignore[arg-type]
        bias=class_bias(path, site.dtype, editor),  # type: ignore[arg-type]
        target=cast(target, torch.int64, editor),  # type: ignore[arg-type]
        choices=None,
        class_weight=site.form.class_weight,  # type: ignore[arg-type]
        row_weight=row_weight,  # type: ignore[arg-type]
        adapter_x=adapter_x,  # type: ignore[arg-type]
        adapter_weight=adapter_weight,  # type: ignore[arg-type]
        adapter_scale=linear.adapter_scale,
        epilogue=str(path.chain.epilogue),
        operands=operands,  # type: ignore[arg-type]
        num_classes=classes,  # type: ignore[arg-type]
        ignore_index=site.form.ignore_index,
        label_smoothing=site.form.label_smoothing,
        reduction=site.reduction,
        statistics="",
        row_loss="",
        row_operands=[],
        loss_dtype=site.loss_dtype,
        gradients=list(site.gradients.flags),
        schedule=candidate.schedule,
        scheme=candidate.scheme,
        workspace=candidate.workspace,
        autocast=False,
    )
    return editor.getitem(editor.call(torch.ops.structfly.linear_cross_entropy_v3.default, *arguments), 0)

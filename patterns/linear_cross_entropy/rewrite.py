"""Writing the fused head into the graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from structfly.compat import storage_key
from structfly.lowering.linear_cross_entropy.arguments import Arguments, Outputs
from structfly.patterns.head.menu import FusedCandidate
from structfly.patterns.head.operands import cast, chain_operand, class_bias, class_rows, matrix, moved_rows
from structfly.patterns.head.path import LogitsPath
from structfly.patterns.head.weighted_sum import Weights, write_weights
from structfly.patterns.linear_cross_entropy.consumers import StatisticForm
from structfly.patterns.linear_cross_entropy.loss import LossForm
from structfly.patterns.linear_cross_entropy.pieces import Pieces, part_losses, whole_target
from structfly.patterns.linear_cross_entropy.row_operands import RowWriter, add_terms
from structfly.patterns.linear_cross_entropy.same_rows import SameRows, choices, values
from structfly.patterns.linear_cross_entropy.site import CrossEntropySite
from structfly.rewriter.editor import Editor
from structfly.rewriter.region import example_of, example_tensors
from structfly.rewriter.views import RowView
from structfly.rewriter.writes import written


def rewrite_head(site: CrossEntropySite, candidate: FusedCandidate, editor: Editor) -> None:
    """Insert the op, let the users of what it replaces use its values, and remove the logits."""
    if site.pieces is not None:
        _rewrite_pieces(site, site.pieces, candidate, editor)
    elif site.same is not None:
        _rewrite_same_rows(site, site.same, candidate, editor)
    editor.erase(site.dead_nodes)


def _rewrite_same_rows(site: CrossEntropySite, same: SameRows, candidate: FusedCandidate, editor: Editor) -> None:
    assert same.place is not None
    editor.before(same.place)
    for node in same.moved:
        editor.hoist(node)
    form = None if same.loss is None else same.loss[1]
    target = None if form is None else _row_targets(form, editor)
    weights = None if same.total is None or target is None else write_weights(same.total, target, editor)
    writer = None
    if same.row_loss is not None:
        shapes = {each.anchor: (path, each) for path, each in same.consumers}
        writer = RowWriter(same.row_loss, lambda anchor: _ones(*shapes[anchor], site, editor), editor)
    rows = _hidden(site, site.path.views, editor)
    row_weight = None if weights is None else weights.rows
    made = _op(site, candidate, editor, rows, target, row_weight, choices(same, editor), writer)
    if same.row_loss is not None:
        editor.before(same.row_loss.root, same.place)
        scalar = add_terms(same.row_loss, made["loss"], editor)
        editor.replace(same.row_loss.root, cast(scalar, example_of(same.row_loss.root).dtype, editor))
    kept = same.kept
    for number, (path, consumer) in enumerate(same.consumers):
        if not any(consumer is each for _, each in kept):
            continue
        end = same.end(consumer)
        editor.before(end, same.place)
        if consumer is form and form is not None and same.row_loss is None:
            value = made["loss"]
            if weights is not None:
                value = _finish(value, weights, form.negated, editor)
            else:
                value = editor.method("reshape_as", value, target) if form.reduction == "none" else value
                value = editor.call(torch.neg, value) if form.negated else value
        else:
            value = _shaped(values(same, made, number, editor), path, consumer, site, editor)
        if site.gradients.any and example_of(value).requires_grad and end not in same.carrying:
            value = editor.method("detach", value)
        if _is_overwritten(end):  # eager's value shares its memory with no other
            value = editor.call(torch.clone, value)
        editor.replace(end, value)


def _is_overwritten(node: fx.Node) -> bool:
    """Whether something writes into the value of ``node``, or into a view of it."""
    value = example_of(node)
    for user in node.users:
        if node in written(user):
            return True
        shares = any(storage_key(tensor) == storage_key(value) for tensor in example_tensors(user))
        if shares and _is_overwritten(user):
            return True
    return False


def _ones(path: LogitsPath, form: LossForm | StatisticForm, site: CrossEntropySite, editor: Editor) -> fx.Node:
    """Ones in the shape of a consumer's value of every row."""
    source = _row_targets(form, editor) if isinstance(form, LossForm) else _row_shape(path, form, site, editor)
    return editor.call(torch.ones_like, source, dtype=torch.float32, memory_format=torch.contiguous_format)


def _row_shape(path: LogitsPath, form: StatisticForm, site: CrossEntropySite, editor: Editor) -> fx.Node:
    rows = editor.call(torch.select, moved_rows(path.linear, path.views, site.dtype, editor), -1, 0)
    return editor.call(torch.unsqueeze, rows, form.class_dim) if form.keeps_dim else rows


def _shaped(
    value: fx.Node, path: LogitsPath, form: LossForm | StatisticForm, site: CrossEntropySite, editor: Editor
) -> fx.Node:
    """A value of every row as the consumer ``form`` had it: in the shape of its own rows, in its dtype."""
    if isinstance(form, LossForm):
        if form.reduction == "none":
            value = editor.method("reshape_as", value, _row_targets(form, editor))
    else:
        value = editor.method("reshape_as", value, _row_shape(path, form, site, editor))
    return cast(value, example_of(form.anchor).dtype, editor)


def _row_targets(form: LossForm, editor: Editor) -> fx.Node:
    """The targets in the shape of the losses."""
    return form.target if form.target_dim is None else editor.call(torch.squeeze, form.target, form.target_dim)


def _finish(loss: fx.Node, weights: Weights, negated: bool, editor: Editor) -> fx.Node:
    constant = -weights.constant if negated else weights.constant
    if constant != 1.0:
        loss = editor.call(torch.mul, loss, constant)
    if weights.count is not None:
        loss = editor.call(torch.div, loss, weights.count)
    return loss


def _rewrite_pieces(site: CrossEntropySite, pieces: Pieces, candidate: FusedCandidate, editor: Editor) -> None:
    rows = _hidden(site, site.path.views[: pieces.shared_views], editor)
    target = whole_target(pieces, rows, editor)
    losses = _op(site, candidate, editor, rows, target, None, None)["loss"]
    losses = editor.method("reshape_as", losses, target)
    for member in pieces.members:
        editor.before(member.form.anchor)
        loss = part_losses(pieces, member, losses, editor)
        loss = editor.method("to", loss, example_of(member.form.anchor).dtype)
        editor.replace(member.form.anchor, editor.call(torch.neg, loss) if member.form.negated else loss)


def _hidden(site: CrossEntropySite, views: Sequence[RowView], editor: Editor) -> fx.Node:
    return moved_rows(site.path.linear, views, site.dtype, editor)


def _op(
    site: CrossEntropySite,
    candidate: FusedCandidate,
    editor: Editor,
    rows: fx.Node,
    target: fx.Node | None,
    row_weight: fx.Node | None,
    indices: fx.Node | None,
    writer: RowWriter | None = None,
) -> dict[str, fx.Node]:
    """The op's loss and statistics, by name, for hidden states ``rows`` of shape (..., H), targets of as many entries,
    (N, K) choices, all in the user's order, and what writes the row program's operands."""
    path, form = site.path, site.form
    linear, adapter = path.linear, path.linear.adapter
    views = path.views if site.pieces is None else path.views[: site.pieces.shared_views]
    weight = class_rows(linear, site.dtype, editor)
    classes: int | fx.Node = editor.size(weight, 0) if path.num_classes is None else path.num_classes
    adapter_x = None if adapter is None else matrix(moved_rows(adapter, views, site.dtype, editor), editor)
    adapter_weight = None if adapter is None else class_rows(adapter, site.dtype, editor)
    if target is not None:
        target = cast(editor.call(torch.reshape, target, (-1,)), torch.int64, editor)
    operands = [chain_operand(o, path, views, weight, classes, site.dtype, editor) for o in path.chain.operands]

    def grouped(node: fx.Node | None) -> Any:
        return node if node is None or writer is None else writer.grouped(node)

    for place, operand in enumerate(path.chain.operands):
        if operand.kind == "row":
            operands[place] = grouped(operands[place])
    arguments = Arguments(
        x=grouped(matrix(rows, editor)),
        weight=weight,  # type: ignore[arg-type]
        bias=class_bias(path, site.dtype, editor),  # type: ignore[arg-type]
        target=grouped(target),
        choices=grouped(indices),
        class_weight=None if form is None else form.class_weight,  # type: ignore[arg-type]
        row_weight=row_weight,  # type: ignore[arg-type]
        adapter_x=grouped(adapter_x),
        adapter_weight=adapter_weight,  # type: ignore[arg-type]
        adapter_scale=linear.adapter_scale,
        epilogue=str(path.chain.epilogue),
        operands=operands,  # type: ignore[arg-type]
        num_classes=classes,  # type: ignore[arg-type]
        ignore_index=None if form is None else form.ignore_index,
        label_smoothing=site.label_smoothing,
        reduction=site.reduction,
        statistics=",".join(site.statistics),
        row_loss=site.row_program,
        row_operands=[] if writer is None else writer.operands(),
        row_group=[] if writer is None else writer.group(),  # type: ignore[arg-type]
        loss_dtype=site.loss_dtype,
        gradients=list(site.gradients.flags),
        schedule=candidate.schedule,
        scheme=candidate.scheme,
        workspace=candidate.workspace,
        autocast=False,
    )
    node = editor.call(torch.ops.structfly.linear_cross_entropy_v4.default, *arguments)
    made = {name: editor.getitem(node, Outputs._fields.index(name)) for name in site.outputs}
    if writer is None:
        return made
    return {name: value if name == "loss" else writer.as_given(value) for name, value in made.items()}

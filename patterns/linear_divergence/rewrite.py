"""Writing the fused divergence into the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from structfly.lowering.linear_divergence.arguments import Arguments
from structfly.patterns.head.menu import FusedCandidate
from structfly.patterns.head.operands import class_bias, class_rows, matrix, moved_rows
from structfly.patterns.head.path import LogitsPath
from structfly.patterns.head.weighted_sum import write_weights
from structfly.patterns.linear_divergence.site import DivergenceSite
from structfly.patterns.linear_divergence.teacher import teacher_dtype
from structfly.rewriter.editor import Editor
from structfly.rewriter.region import example_of


def rewrite_divergence(site: DivergenceSite, candidate: FusedCandidate, editor: Editor) -> None:
    """Insert the op before what it replaces, and remove the student's logits."""
    editor.before(site.node)
    path, class_dim = site.path, site.path.class_dim
    rows = moved_rows(path.linear, path.views, site.dtype, editor)
    weight = class_rows(path.linear, site.dtype, editor)
    classes: int | fx.Node = editor.size(weight, 0) if path.num_classes is None else path.num_classes
    like = editor.call(torch.select, rows, -1, 0)
    if site.divergence.kept or not site.divergence.reduction:
        like = editor.call(torch.unsqueeze, like, class_dim)
    scale, row_weight, divisors = site.kind.scale, None, []
    if site.total is not None:
        weights = write_weights(site.total, like, editor)
        scale, row_weight = scale * weights.constant, weights.rows
        divisors = [] if weights.count is None else [weights.count]
        divisors += [classes] if site.total.over_classes else []
        reduction = "sum"
    else:
        reduction, divisors = _reduction(site, rows, classes, editor)
    arguments = Arguments(
        x=matrix(rows, editor),  # type: ignore[arg-type]
        weight=weight,  # type: ignore[arg-type]
        bias=class_bias(path, site.dtype, editor),  # type: ignore[arg-type]
        **_adapter(site, editor),
        epilogue=str(path.chain.epilogue),
        **_teacher(site, classes, editor),
        row_weight=row_weight,  # type: ignore[arg-type]
        num_classes=classes,  # type: ignore[arg-type]
        kind=site.kind.kind,
        beta=site.kind.beta,
        label_smoothing=site.divergence.label_smoothing,
        reduction=reduction,
        loss_dtype=site.loss_dtype,
        gradients=list(site.gradients.flags),
        schedule=candidate.schedule,
        workspace=candidate.workspace,
        autocast=False,
    )
    loss = editor.getitem(editor.call(torch.ops.structfly.linear_divergence_v1.default, *arguments), 0)
    if reduction == "none":
        loss = editor.method("reshape_as", loss, like)
    for divisor in divisors:
        loss = editor.call(torch.div, loss, divisor)
    if scale != 1.0:
        loss = editor.call(torch.mul, loss, scale)
    editor.replace(site.node, loss)
    editor.erase(site.dead_nodes)


def _reduction(
    site: DivergenceSite, rows: fx.Node, classes: int | fx.Node, editor: Editor
) -> tuple[str, list[int | fx.Node]]:
    """The op's reduction, and what its loss is still to be divided by."""
    reduction = site.divergence.reduction
    if reduction in ("rows", "sum"):
        return {"rows": "none", "sum": "sum"}[reduction], []
    if reduction == "row_mean":
        return "mean", []
    if reduction == "mean":
        return "mean", [classes]
    if site.path.class_dim == 0:  # batchmean divides by the first dimension, whatever it is
        return "sum", [classes]
    return ("mean", []) if example_of(rows).ndim == 2 else ("sum", [editor.size(rows, 0)])


def _adapter(site: DivergenceSite, editor: Editor) -> dict[str, Any]:
    path = site.path
    adapter = path.linear.adapter
    if adapter is None:
        return {"adapter_x": None, "adapter_weight": None, "adapter_scale": 1.0}
    return {
        "adapter_x": matrix(moved_rows(adapter, path.views, site.dtype, editor), editor),
        "adapter_weight": class_rows(adapter, site.dtype, editor),
        "adapter_scale": path.linear.adapter_scale,
    }


def _teacher(site: DivergenceSite, classes: int | fx.Node, editor: Editor) -> dict[str, Any]:
    teacher = site.teacher
    if isinstance(teacher, LogitsPath):
        dtype = teacher_dtype(teacher)
        return {
            "teacher": None,
            "teacher_form": "logits",
            "teacher_x": matrix(moved_rows(teacher.linear, teacher.views, dtype, editor), editor),
            "teacher_weight": class_rows(teacher.linear, dtype, editor),
            "teacher_bias": class_bias(teacher, dtype, editor),
            "teacher_epilogue": str(teacher.chain.epilogue),
        }
    given, class_dim = teacher.node, site.path.class_dim
    if class_dim != example_of(given).ndim - 1:
        given = editor.call(torch.movedim, given, class_dim, -1)
    return {
        "teacher": editor.call(torch.reshape, given, (-1, classes)) if example_of(given).ndim != 2 else given,
        "teacher_form": teacher.form,
        "teacher_x": None,
        "teacher_weight": None,
        "teacher_bias": None,
        "teacher_epilogue": teacher.epilogue,
    }

"""A head's operands as an op takes them: matrices of one dtype, moved as the logits were."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from structfly.lowering.head.chunks import wide_dtype
from structfly.patterns.head.chain import LeadingClasses, Operand, Place
from structfly.patterns.head.path import LogitsPath
from structfly.rewriter.editor import Editor
from structfly.rewriter.linear import LinearLike
from structfly.rewriter.region import example_of
from structfly.rewriter.views import RowView


def moved_rows(linear: LinearLike, views: Sequence[RowView], dtype: torch.dtype, editor: Editor) -> fx.Node:
    """Hidden states, moved by ``views`` as the logits were, classes (now hidden units) last."""
    x, class_dim = _in_place_of_logits(linear, editor)
    x = cast(x, dtype, editor)
    return classes_last(x, class_dim, views, editor.size(x, class_dim), editor)


def _in_place_of_logits(linear: LinearLike, editor: Editor) -> tuple[fx.Node, int]:
    """Hidden states with the hidden units where the linear's value has classes, and which dimension that is."""
    x = linear.x if linear.hidden_dim == linear.class_dim else editor.method("t", linear.x)
    return x, linear.class_dim % example_of(x).ndim


def classes_last(
    rows: fx.Node, class_dim: int, views: Sequence[RowView], width: int | fx.Node, editor: Editor
) -> fx.Node:
    """``rows``, with ``width`` entries where the logits had classes, moved by ``views``, those entries last."""
    rows, class_dim = replayed(rows, class_dim, views, width, editor)
    if class_dim != example_of(rows).ndim - 1:
        rows = editor.call(torch.movedim, rows, class_dim, -1)
    return rows


def replayed(
    rows: fx.Node, class_dim: int, views: Sequence[RowView], width: int | fx.Node, editor: Editor
) -> tuple[fx.Node, int]:
    """``rows`` moved by ``views``, and where the entries that stand for classes are then."""
    for view in views:
        rows = view.replay(editor, rows, width)
        class_dim = view.class_dim
    return rows, class_dim


def cast(node: fx.Node, dtype: torch.dtype, editor: Editor) -> fx.Node:
    return node if example_of(node).dtype == dtype else editor.method("to", node, dtype)


def matrix(rows: fx.Node, editor: Editor) -> fx.Node:
    """(..., H) as (N, H)."""
    value = example_of(rows)
    return rows if value.ndim == 2 else editor.call(torch.reshape, rows, (-1, editor.size(rows, -1)))


def class_rows(linear: LinearLike, dtype: torch.dtype, editor: Editor) -> fx.Node:
    """The weight, a row a class."""
    weight = cast(linear.weight, dtype, editor)
    return editor.method("t", weight) if linear.transposed else weight


def class_bias(path: LogitsPath, dtype: torch.dtype, editor: Editor) -> fx.Node | None:
    """The bias, one number a class."""
    return None if path.bias is None else cast(editor.call(torch.reshape, path.bias, (-1,)), dtype, editor)


def chain_operand(
    operand: Operand,
    path: LogitsPath,
    views: Sequence[RowView],
    weight: fx.Node,
    classes: int | fx.Node,
    dtype: torch.dtype,
    editor: Editor,
) -> fx.Node:
    """An operand of the chain in the shape that the op takes.

    Args:
        views: how the op's rows have moved.
        weight: as the op takes it.
        classes: how many of its rows count.
        dtype: of the logits.
    """
    device = example_of(weight).device
    if isinstance(operand, LeadingClasses):
        return editor.call(torch.lt, editor.call(torch.arange, classes, device=device), operand.count)
    node = operand.node
    if not (operand.condition or example_of(node).is_floating_point()):
        node = editor.method("to", node, wide_dtype(dtype))
    if example_of(node).device != device:  # a number may be elsewhere
        node = editor.method("to", node, device)
    if operand.place is not None:
        return _row_operand(node, operand.place, path.linear, views, editor)
    node = editor.call(torch.reshape, node, () if operand.kind == "scalar" else (-1,))
    if operand.kind == "class" and isinstance(classes, int) and example_of(node).shape[0] != classes:
        node = editor.call(torch.narrow, node, 0, 0, classes)
    return node


def _row_operand(node: fx.Node, place: Place, linear: LinearLike, views: Sequence[RowView], editor: Editor) -> fx.Node:
    """One number a row (N,): spread over the rows where it meets the logits, and moved as they are from there on."""
    x, class_dim = _in_place_of_logits(linear, editor)
    like, _ = replayed(x, class_dim, views[: place.views], editor.size(x, class_dim), editor)
    rank = example_of(like).ndim
    shape = tuple(1 if dim == place.class_dim else editor.size(like, dim) for dim in range(rank))
    spread = editor.call(torch.broadcast_to, node, shape)
    rows = classes_last(spread, place.class_dim, views[place.views :], 1, editor)
    return editor.call(torch.reshape, rows, (-1,))

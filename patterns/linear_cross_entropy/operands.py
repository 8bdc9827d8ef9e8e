"""A head's operands as an op takes them: matrices of one dtype, moved as the logits were."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from structfly.patterns.linear_cross_entropy.logits import LogitsPath, example_of
from structfly.rewriter.editor import Editor
from structfly.rewriter.linear import LinearLike
from structfly.rewriter.views import RowView


def moved_rows(x: fx.Node, views: Sequence[RowView], dtype: torch.dtype, editor: Editor) -> fx.Node:
    """Hidden states, moved by ``views`` as the logits were, classes (now hidden units) last."""
    x = cast(x, dtype, editor)
    width = editor.size(x, -1)
    class_dim = example_of(x).ndim - 1
    for view in views:
        x = view.replay(editor, x, width)
        class_dim = view.class_dim
    if class_dim != example_of(x).ndim - 1:
        x = editor.call(torch.movedim, x, class_dim, -1)
    return x


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
    """The linear's own bias and the vector added to its value, as one vector over all classes."""
    vectors = [vector for vector in (path.linear.bias, path.bias) if vector is not None]
    flat = [cast(editor.call(torch.reshape, vector, (-1,)), dtype, editor) for vector in vectors]
    if len(flat) == 2 and path.num_classes is not None:
        flat = [editor.call(torch.narrow, vector, 0, 0, path.num_classes) for vector in flat]
    return editor.call(torch.add, *flat) if len(flat) == 2 else next(iter(flat), None)

"""Which rows a loss counts, and what its mean divides by, as nodes."""

from __future__ import annotations

import torch
from torch import fx

from structfly.patterns.linear_cross_entropy.loss import LossForm
from structfly.rewriter.editor import Editor


def live_rows(form: LossForm, editor: Editor) -> fx.Node:
    """Which rows are not ignored, (N,)."""
    return editor.call(torch.ne, editor.call(torch.reshape, form.target, (-1,)), form.ignore_index)


def mean_divisor(form: LossForm, editor: Editor) -> fx.Node:
    """What a mean loss divides the sum of its rows by, ()."""
    target = editor.call(torch.reshape, form.target, (-1,))
    if form.ignore_index is None:
        return editor.call(torch.sum, editor.call(torch.ones_like, target))
    live = live_rows(form, editor)
    if form.class_weight is None:
        return editor.call(torch.sum, live)
    index = editor.call(torch.where, live, target, 0)
    weights = editor.call(torch.where, live, editor.call(torch.index_select, form.class_weight, 0, index), 0)
    return editor.call(torch.sum, weights)

"""Writing a row program's operands: values of the user's graph in the order and the number of the rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from structfly.patterns.linear_cross_entropy.loss import LossForm
from structfly.patterns.linear_cross_entropy.mean import live_rows, mean_divisor
from structfly.patterns.linear_cross_entropy.row_loss import Level, Operand, RowLoss
from structfly.rewriter.editor import Editor
from structfly.rewriter.region import example


def write_operands(loss: RowLoss, ones: Callable[[fx.Node], fx.Node], editor: Editor) -> list[fx.Node]:
    """The operands as nodes, (N,) or () each.

    Args:
        ones: makes ones, contiguous, in the shape of a consumer's anchor.
    """
    writer = _Writer(ones, editor)
    return [writer.write(operand) for operand in loss.operands]


def add_terms(loss: RowLoss, value: fx.Node, editor: Editor) -> fx.Node:
    """The scalar: the op's sum over rows and what the user added to it."""
    for term in loss.terms:
        node = term.node
        for operation, operand in term.steps:
            node = editor.call(torch.mul if operation == "mul" else torch.div, node, operand)
        value = editor.call(torch.add, value, node)
    return value


class _Writer:
    def __init__(self, ones: Callable[[fx.Node], fx.Node], editor: Editor) -> None:
        self.make_ones, self.editor = ones, editor
        self.shapes: dict[Level, fx.Node] = {}

    def write(self, operand: Operand) -> fx.Node:
        editor = self.editor
        if operand.loss is not None:
            return self._of_loss(operand.loss, operand.live)
        if operand.count and operand.level is not None and operand.level.parent is not None:
            counts = editor.call(torch.ones_like, self._shape(operand.level.parent), dtype=torch.float32)
            return self._rows(self._sum(counts, operand.level), operand.level)
        node = operand.node
        assert node is not None
        if example(node) is None:  # a size
            return editor.call(torch.full, (), node, dtype=torch.float32)
        return node if operand.level is None else self._rows(node, operand.level)

    def _of_loss(self, form: LossForm, live: bool) -> fx.Node:
        return live_rows(form, self.editor) if live else mean_divisor(form, self.editor)

    def _sum(self, node: fx.Node, level: Level) -> fx.Node:
        return self.editor.call(torch.sum, node, level.dims, level.keeps_dims) if level.dims else node

    def _shape(self, level: Level) -> fx.Node:
        """Something with the shape of a level."""
        if level not in self.shapes:
            if level.parent is None:
                self.shapes[level] = self.make_ones(level.node)
            elif level.dims is not None:
                self.shapes[level] = self._sum(self._shape(level.parent), level)
            else:
                call, source = level.node, self._shape(level.parent)
                self.shapes[level] = self.editor.like(call, source, *call.args[1:], **call.kwargs)
        return self.shapes[level]

    def _rows(self, node: fx.Node, level: Level) -> fx.Node:
        """``node``, broadcast to ``level``, as one value for each row that goes into it."""
        editor = self.editor
        node = editor.method("expand_as", node, self._shape(level))
        while level.parent is not None:
            before = self._shape(level.parent)
            if level.dims is None:
                node = editor.method("reshape_as", node, before)
            else:
                for dim in () if level.keeps_dims else level.dims:
                    node = editor.call(torch.unsqueeze, node, dim)
                node = editor.method("expand_as", node, before)
            level = level.parent
        return editor.call(torch.reshape, node, (-1,))

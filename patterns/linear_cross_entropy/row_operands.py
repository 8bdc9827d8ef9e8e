"""Writing a row program's operands, values of the user's graph in the order of the rows, and that order."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from structfly.patterns.linear_cross_entropy.mean import live_rows, mean_divisor
from structfly.patterns.linear_cross_entropy.row_axes import Axis, OfConsumer, OfReshape, Quotient, leaves_of
from structfly.patterns.linear_cross_entropy.row_loss import Count, LiveRows, MeanDivisor, Operand, RowLoss
from structfly.rewriter.editor import Editor
from structfly.rewriter.region import example, example_of


def add_terms(loss: RowLoss, value: fx.Node, editor: Editor) -> fx.Node:
    """The scalar: the op's sum over rows and what the user added to it."""
    for term in loss.terms:
        node = term.node
        for operation, operand in term.steps:
            node = editor.call(torch.mul if operation == "mul" else torch.div, node, operand)
        value = editor.call(torch.add, value, node)
    return value


class RowWriter:
    """Writes what depends on the axes of the rows.

    Args:
        ones: makes ones, contiguous, in the shape of a consumer's rows.
    """

    def __init__(self, loss: RowLoss, ones: Callable[[fx.Node], fx.Node], editor: Editor) -> None:
        self._loss, self._make_ones, self._editor = loss, ones, editor
        self.axes = loss.axes
        self._shapes: dict[fx.Node, fx.Node] = {}
        self._sizes: dict[Axis, int | fx.Node] = {}

    # ------------------------------------------------------------------------------------------- the order

    def grouped(self, node: fx.Node) -> fx.Node:
        """Values (N, ...) in the user's order, as the op takes them: groups one after another."""
        return self._moved(node, self.axes.given, (*self.axes.outer, *self.axes.inner))

    def as_given(self, node: fx.Node) -> fx.Node:
        """Values (N, ...) in the op's order, in the user's."""
        return self._moved(node, (*self.axes.outer, *self.axes.inner), self.axes.given)

    def group(self) -> list[int | fx.Node]:
        """The shape of a group."""
        return [self._size(axis) for axis in self.axes.inner]

    def _moved(self, node: fx.Node, before: tuple[Axis, ...], after: tuple[Axis, ...]) -> fx.Node:
        if before == after:
            return node
        editor = self._editor
        node = editor.call(torch.unflatten, node, 0, [self._size(axis) for axis in before])
        rest = range(len(before), example_of(node).ndim)
        node = editor.call(torch.permute, node, [*(before.index(axis) for axis in after), *rest])
        return editor.call(torch.flatten, node, 0, len(before) - 1)

    # ------------------------------------------------------------------------------------------- operands

    def operands(self) -> list[Any]:
        """What the program takes: (), or (groups, *sizes) with the group's sizes, or 1 where it is the same."""
        return [self._operand(operand) for operand in self._loss.operands]

    def _operand(self, operand: Operand) -> fx.Node:
        editor = self._editor
        if isinstance(operand, MeanDivisor):
            return mean_divisor(operand.form, editor)
        if isinstance(operand, LiveRows):
            return self._spread(live_rows(operand.form, editor), self.axes.given)
        if isinstance(operand, Count):
            return self._number(self._product(leaves_of(operand.dims)))
        if example(operand.node) is None:  # a size
            return self._number(operand.node)
        if operand.dims is None:
            return operand.node
        node = editor.call(torch.broadcast_to, operand.node, [self._product(axes) for axes in operand.dims])
        return self._spread(node, leaves_of(operand.dims))

    def _number(self, size: int | fx.Node) -> fx.Node:
        return self._editor.call(torch.full, (), size, dtype=torch.float32)

    def _spread(self, node: fx.Node, there: Sequence[Axis]) -> fx.Node:
        """``node`` with one entry for each place along the axes ``there``, as an operand."""
        editor, outer, inner = self._editor, self.axes.outer, self.axes.inner
        node = editor.call(torch.reshape, node, [self._size(axis) for axis in there])
        order = [axis for axis in (*outer, *inner) if axis in there]
        if order != list(there):
            node = editor.call(torch.permute, node, [list(there).index(axis) for axis in order])
        if order != [*outer, *inner]:
            sizes = [self._size(axis) if axis in there else 1 for axis in (*outer, *inner)]
            node = editor.call(torch.reshape, node, sizes)
        if not set(outer).issubset(there):
            node = editor.method("expand", node, [*map(self._size, outer), *[-1] * len(inner)])
        sizes = [self._size(axis) if axis in there else 1 for axis in inner]
        return editor.call(torch.reshape, node, (-1, *sizes))

    # ------------------------------------------------------------------------------------------- sizes

    def _product(self, axes: Sequence[Axis]) -> int | fx.Node:
        product: int | fx.Node = 1
        for size in map(self._size, axes):
            if isinstance(size, int) and isinstance(product, int):
                product *= size
            else:
                product = size if product == 1 else self._editor.call(operator.mul, product, size)
        return product

    def _size(self, axis: Axis) -> int | fx.Node:
        if isinstance(axis.size, int):
            return axis.size
        if axis not in self._sizes:
            self._sizes[axis] = self._found(axis)
        return self._sizes[axis]

    def _found(self, axis: Axis) -> int | fx.Node:
        origin = axis.origin
        if isinstance(origin, Quotient):
            return self._editor.call(operator.floordiv, self._size(origin.axis), origin.parts)
        assert origin is not None
        if origin.node not in self._shapes:
            self._shapes[origin.node] = self._shaped(origin)
        return self._editor.size(self._shapes[origin.node], origin.dim)

    def _shaped(self, origin: OfConsumer | OfReshape) -> fx.Node:
        """Something in the shape in which ``origin`` has the rows."""
        if isinstance(origin, OfConsumer):
            return self._make_ones(origin.node)
        rows = self._editor.call(torch.empty, [self._product(axes) for axes in origin.source])
        call = origin.node
        return self._editor.like(call, rows, *call.args[1:], **call.kwargs)

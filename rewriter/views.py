"""Shape operations between a linear and its loss, read so that they can be replayed on another tensor.

Logits are rows of classes.  A view that keeps the class dimension whole only moves rows, so the same view applied to
the hidden states (whose last dimension stands where the classes stood) moves them alike.  That is how a rewrite
follows slices, splits, transposes and reshapes without having logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from structfly.compat import expression
from structfly.rewriter.calls import Call, flat, read
from structfly.rewriter.editor import Editor
from structfly.rewriter.region import example

SPLITS = ("split", "chunk", "tensor_split", "unbind")
RESHAPES = ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze")
_MOVES = ("transpose", "permute", "movedim", "t")
PICKS = ("getitem", "select", "narrow")
VIEWS = (*RESHAPES, *_MOVES, *PICKS)


class ClassSize:
    """Stands in a shape for the size of the class dimension."""


_CLASSES = ClassSize()


@dataclass(frozen=True)
class RowView:
    """One view of rows.

    Attributes:
        call: the view; for an element of a split, the split.
        class_dim: where the class dimension is afterwards.
        arguments: positional arguments after the tensor, with :class:`ClassSize` where the class size stood.
        element: which element of the split's tuple, or None.
        num_classes: the view also cut the classes to the first so many, or None.
        ordered: True if all rows stay, in their row-major order: what is done to the class dimension does not count.
    """

    call: Call
    class_dim: int
    arguments: tuple[Any, ...]
    element: int | None = None
    num_classes: int | None = None
    ordered: bool = False

    def replay(self, editor: Editor, source: fx.Node, class_size: int | fx.Node) -> fx.Node:
        """The same view of ``source``, which has ``class_size`` entries where the logits had classes."""
        arguments = tuple(_fill(argument, class_size) for argument in self.arguments)
        if self.call.op == "reshape":
            return editor.call(torch.reshape, source, arguments)
        node = editor.like(self.call.node, source, *arguments)
        return node if self.element is None else editor.getitem(node, self.element)


def _fill(argument: Any, size: int | fx.Node) -> Any:
    return size if isinstance(argument, ClassSize) else argument


def read_view(node: fx.Node, class_dim: int) -> RowView | str | None:
    """The view ``node`` takes of logits whose classes are dimension ``class_dim``.

    Returns:
        the view, or a reason why rows cannot follow it, or None if the node is no view at all.
    """
    call = read(node)
    if call is None:
        return None
    if call.op == "getitem" and isinstance(example_tuple(call["input"]), (tuple, list)):
        return _element(call, class_dim)
    if call.op == "getattr":
        return _swap(call, class_dim) if call["name"] in ("T", "mT") else None
    if call.op not in VIEWS:
        return None
    tensor = example(call["input"])
    if tensor is None:
        return "the viewed value is not one tensor"
    if call.op in ("view", "reshape"):
        return _reshape(call, class_dim, flat(call["shape"]))
    if call.op == "getitem":
        return _getitem(call, class_dim, tensor.ndim)
    if call.op == "t":
        return _swap(call, class_dim)
    return _by_dimension(call, class_dim, tensor.ndim)


def view_input(node: fx.Node) -> fx.Node:
    """The tensor a view looks at, beneath the split for an element of one."""
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    if isinstance(example_tuple(source), (tuple, list)):
        source = source.args[0]  # type: ignore[assignment]
    return source


def example_tuple(node: object) -> Any:
    """The example value of a node, whatever it is."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def _swap(call: Call, class_dim: int) -> RowView | str:
    tensor = example(call["input"])
    if tensor is None or tensor.ndim != 2:
        return "a transpose without dimensions is read for matrices only"
    return RowView(replace(call, op="t"), 1 - class_dim, call.node.args[1:], ordered=True)


def _reshape(call: Call, class_dim: int, shape: tuple[Any, ...]) -> RowView | str:
    before, after = example(call["input"]), example(call.node)
    if before is None or after is None or (shape and isinstance(shape[0], torch.dtype)):
        return "a view that changes the dtype"
    position = _follow(before, after, class_dim)
    if position is None:
        return f"{call.op} to {tuple(after.shape)} mixes the class dimension with others"
    arguments = tuple(_CLASSES if index == position else size for index, size in enumerate(shape))
    return RowView(replace(call, op="reshape"), position, arguments, ordered=True)


def _follow(before: torch.Tensor, after: torch.Tensor, class_dim: int) -> int | None:
    """Where a reshape puts the class dimension: same size, and as many elements behind it."""
    sizes = [expression(size) for size in before.shape]
    behind = sympy.expand(math.prod(sizes[class_dim + 1 :], start=sympy.Integer(1)))
    total = sympy.Integer(1)
    for position in reversed(range(after.ndim)):
        size = expression(after.shape[position])
        if size == sizes[class_dim] and sympy.expand(total - behind) == 0:
            return position
        total *= size
    return None


def _getitem(call: Call, class_dim: int, ndim: int) -> RowView | str:
    index = call["index"]
    entries = list(index) if isinstance(index, tuple) else [index]
    used = sum(entry is not None and entry is not Ellipsis for entry in entries)
    if any(isinstance(entry, (list, bool)) for entry in entries):
        return "indexing with a list or a boolean"
    tensors = [isinstance(entry, fx.Node) and example(entry) is not None for entry in entries]
    if any(tensors):
        return _advanced(call, class_dim, ndim, entries, tensors)
    if Ellipsis in entries:
        at = entries.index(Ellipsis)
        entries[at : at + 1] = [slice(None)] * (ndim - used)
    dim = out = 0
    position, num_classes, ordered = None, None, True
    for place, entry in enumerate(entries):
        if entry is None:
            out += 1
            continue
        if dim == class_dim:
            if not isinstance(entry, slice) or entry.step not in (None, 1) or entry.start not in (None, 0):
                return "the classes are indexed by something other than a leading slice"
            if entry.stop is not None and not isinstance(entry.stop, int):
                return "the classes are cut at a length that is not a constant"
            num_classes = entry.stop
            entries[place] = slice(None)
            position = out
        elif entry != slice(None) and entry != slice(0, None):
            ordered = False
        dim += 1
        out += isinstance(entry, slice)
    position = out + class_dim - dim if position is None else position
    return RowView(call, position, (tuple(entries),), num_classes=num_classes, ordered=ordered)


def _advanced(call: Call, class_dim: int, ndim: int, entries: list[Any], tensors: list[bool]) -> RowView | str:
    """Rows picked by index tensors over the leading dimensions."""
    count = sum(tensors)
    result = example(call.node)
    covered = 0
    for entry, is_tensor in zip(entries, tensors, strict=True):
        value = example(entry)
        covered += value.ndim if is_tensor and value is not None and value.dtype == torch.bool else 1
    plain = all(tensors[:count]) and all(entry == slice(None) for entry in entries[count:])
    if result is None or not plain or covered - (len(entries) - count) > class_dim:
        return "rows are picked by an index that is not over the leading dimensions alone"
    return RowView(call, result.ndim - (ndim - class_dim), call.node.args[1:])


def _by_dimension(call: Call, class_dim: int, ndim: int) -> RowView | str:
    """Views given by dimension numbers."""
    result = example(call.node)
    if result is None:
        return "the view's value is not one tensor"
    arguments = call.node.args[1:]
    if call.node.kwargs:
        arguments = tuple(value for key, value in call.arguments.items() if key != "input")
    if call.op in ("transpose", "permute", "movedim"):
        order = list(range(ndim))
        if call.op == "transpose":
            first, second = call["dim0"] % ndim, call["dim1"] % ndim
            order[first], order[second] = second, first
        elif call.op == "permute":
            order = [dim % ndim for dim in flat(call["dims"])]
        else:
            source, destination = call["source"], call["destination"]
            if not isinstance(source, int) or not isinstance(destination, int):
                return "movedim of several dimensions at once"
            order.insert(destination % ndim, order.pop(source % ndim))
        rows = [dim for dim in order if dim != class_dim]
        return RowView(call, order.index(class_dim), arguments, ordered=rows == sorted(rows))
    if call.op == "unsqueeze":
        dim = call["dim"] % (ndim + 1)
        return RowView(call, class_dim + (dim <= class_dim), arguments, ordered=True)
    if call.op == "flatten":
        start, end = call.get("start_dim", 0) % ndim, call.get("end_dim", -1) % ndim
        if start <= class_dim <= end and start != end:
            return "flatten merges the class dimension with others"
        return RowView(call, class_dim - (end - start) * (class_dim > end), arguments, ordered=True)
    dim = call.get("dim")
    if not isinstance(dim, int):
        return f"{call.op} without one dimension number"
    dim %= ndim
    if dim == class_dim:
        if call.op == "narrow" and call["start"] == 0 and isinstance(call["length"], int):
            return RowView(call, class_dim, (dim, 0, _CLASSES), num_classes=call["length"], ordered=True)
        return f"{call.op} along the class dimension"
    if call.op == "unflatten":
        return RowView(call, class_dim + (result.ndim - ndim) * (dim < class_dim), arguments, ordered=True)
    drops = call.op in ("select", "squeeze") and result.ndim < ndim
    return RowView(call, class_dim - (drops and dim < class_dim), arguments, ordered=call.op == "squeeze")


def _element(call: Call, class_dim: int) -> RowView | str | None:
    """An element of a split, chunk or unbind."""
    split = read(call["input"])
    if split is None or split.op not in SPLITS or not isinstance(call["index"], int):
        return None
    tensor = example(split["input"])
    dim = split.get("dim", 0)
    if tensor is None or not isinstance(dim, int):
        return f"{split.op} of something that is not one tensor"
    dim %= tensor.ndim
    if dim == class_dim:
        return f"{split.op} along the class dimension"
    arguments = split.node.args[1:]
    if split.node.kwargs:
        arguments = tuple(value for key, value in split.arguments.items() if key != "input")
    drops = split.op == "unbind" and dim < class_dim
    return RowView(split, class_dim - drops, arguments, element=call["index"])

"""From a loss back to the linear beneath it: what happens to the logits on the way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx

from structfly.compat import expression
from structfly.patterns.linear_cross_entropy.loss import LossForm
from structfly.rewriter.calls import Call, read
from structfly.rewriter.linear import LinearLike, is_cast, read_linear
from structfly.rewriter.region import Region, example
from structfly.rewriter.views import RowView, example_tuple, read_view, view_input
from structfly.rewriter.writes import written


@dataclass(frozen=True)
class DeadClasses:
    """Classes whose logit is set to -inf: from ``start`` on, or where ``mask`` is ``value``."""

    start: int = 0
    mask: fx.Node | None = None
    value: bool = True


@dataclass(frozen=True)
class LogitsPath:
    """The way from a linear to a loss.

    Attributes:
        linear: the producer.
        trail: nodes from just above the linear up to the loss's input, in graph order.
        views: how the rows move, in order.
        view_nodes: the trail node of each view.
        bias: a class vector added to the linear's value, or None.
        epilogue: the op's epilogue string.
        dead: classes set to -inf.
        num_classes: the classes were cut to the first so many, or None.
        class_dim: the class dimension at the loss.
        nodes: all nodes that exist only to make these logits (writes into them included).
    """

    linear: LinearLike
    trail: tuple[fx.Node, ...]
    views: tuple[RowView, ...]
    view_nodes: tuple[fx.Node, ...]
    bias: fx.Node | None
    epilogue: str
    dead: tuple[DeadClasses, ...]
    num_classes: int | None
    class_dim: int
    nodes: frozenset[fx.Node]


@dataclass(frozen=True)
class Obstacle:
    """Why there is no path, where, and how many nodes back that was."""

    node: fx.Node
    reason: str
    progress: int


class Reads(Protocol):
    """What reads logits: a loss, or a softmax; the attributes are those of :class:`LossForm`."""

    @property
    def anchor(self) -> fx.Node: ...
    @property
    def logits(self) -> fx.Node: ...
    @property
    def class_dim(self) -> int: ...
    @property
    def of_log_softmax(self) -> bool: ...
    @property
    def label_smoothing(self) -> float: ...
    @property
    def inner(self) -> tuple[fx.Node, ...]: ...


def trace(form: Reads, region: Region) -> LogitsPath | Obstacle:
    """Walk from a loss's input back to a linear-like producer, then read the way forwards."""
    trail: list[fx.Node] = []
    node = form.logits
    while True:
        linear = read_linear(node)
        if linear is not None:
            break
        source = _logits_operand(node)
        if isinstance(source, str):
            return Obstacle(node, source, len(trail))
        trail.append(node)
        if isinstance(example_tuple(node.args[0]), (tuple, list)):
            trail.append(node.args[0])  # type: ignore[arg-type]  # the split beneath an element
        node = source
    return _Reader(linear, tuple(reversed(trail)), form, region).read()


def _logits_operand(node: fx.Node) -> fx.Node | str:
    """The operand of ``node`` that carries the logits, or why there is none."""
    call = read(node)
    result = example(node)
    if node.op == "placeholder":
        return (
            f"the logits come into this graph as its input {node.name}, so no linear is in sight; if the compiled "
            "function makes them, a graph break lies between: see the report's graph breaks"
        )
    if call is None or result is None:
        return f"{_describe(node)} stands where a linear, or something that may follow one, is expected"
    if call.op in ("contiguous", "clone", "detach", "tanh", "log_softmax") or is_cast(call):
        source = call["input"]
    elif call.op in ("add", "mul", "div") or call.op == "where":
        source = next((a for a in (call["input"], call["other"]) if _same_shape(a, result)), None)
    elif call.op == "masked_fill":
        source = call["input"]
    elif read_view(node, 0) is not None:
        source = view_input(node)
    else:
        return f"{_describe(node)} of the logits is not an operation the head's epilogue has"
    if not isinstance(source, fx.Node):
        return f"{_describe(node)} has no operand shaped like logits"
    return source


def _same_shape(value: object, like: torch.Tensor) -> bool:
    tensor = example(value)
    return (
        tensor is not None
        and tensor.ndim == like.ndim
        and all(expression(a) == expression(b) for a, b in zip(tensor.shape, like.shape, strict=True))
    )


def _describe(node: fx.Node) -> str:
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return f"{target} ({node.name})"


class _PathError(Exception):
    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(reason)
        self.node, self.reason = node, reason


class _Reader:
    """Reads a trail forwards, from the linear to the loss."""

    def __init__(self, linear: LinearLike, trail: tuple[fx.Node, ...], form: Reads, region: Region) -> None:
        self.linear, self.trail, self.form, self.region = linear, trail, form, region
        self.views: list[RowView] = []
        self.view_nodes: list[fx.Node] = []
        self.bias: fx.Node | None = None
        self.steps: list[str] = []
        self.dead: list[DeadClasses] = []
        self.num_classes: int | None = None
        self.writes: list[fx.Node] = []
        self.class_dim = 0
        self.log_softmax = False

    def read(self) -> LogitsPath | Obstacle:
        value = example(self.linear.node)
        if value is None:
            return Obstacle(self.linear.node, "the linear has no example value", len(self.trail))
        self.class_dim = value.ndim - 1
        chain = (self.linear.node, *self.trail)
        try:
            for below, node in zip(chain, (*self.trail, self.form.anchor), strict=True):
                self._writes_into(below, node)
                if node is not self.form.anchor:
                    self._read_one(node)
            self._end()
        except _PathError as failure:
            return Obstacle(failure.node, failure.reason, len(self.trail) + 1)
        return LogitsPath(
            linear=self.linear,
            trail=self.trail,
            views=tuple(self.views),
            view_nodes=tuple(self.view_nodes),
            bias=self.bias,
            epilogue=",".join(self.steps),
            dead=tuple(self.dead),
            num_classes=self.num_classes,
            class_dim=self.class_dim,
            nodes=frozenset((*self.linear.nodes, *self.trail, *self.writes)),
        )

    def _end(self) -> None:
        anchor = self.form.anchor
        if self.class_dim != self.form.class_dim:
            raise _PathError(
                anchor,
                f"the loss takes dimension {self.form.class_dim} as classes, they are {self.class_dim}",
            )
        if self.form.of_log_softmax and not self.log_softmax:
            raise _PathError(anchor, "nll_loss of something that is not a log_softmax of a linear")
        if self.log_softmax and not self.form.of_log_softmax:
            raise _PathError(anchor, "cross_entropy of a log_softmax: the log_softmax is redundant; remove it")

    # ------------------------------------------------------------------------------------------- one node

    def _read_one(self, node: fx.Node) -> None:
        call = read(node)
        assert call is not None
        if isinstance(node.meta.get("example_value"), (tuple, list)):
            return  # a split; its element is read next
        view = read_view(node, self.class_dim)
        if isinstance(view, str):
            raise _PathError(node, view)
        if view is not None:
            self.views.append(view)
            self.view_nodes.append(node)
            self.class_dim = view.class_dim
            if view.num_classes is not None:
                self._cut(view.num_classes, node)
        elif call.op == "log_softmax":
            value = example(node)
            if value is None or not isinstance(call.get("dim"), int) or call["dim"] % value.ndim != self.class_dim:
                raise _PathError(node, "a log_softmax that does not go over the classes")
            self.log_softmax = True
        elif call.op not in ("contiguous", "clone", "detach") and not is_cast(call):
            if self.log_softmax:
                raise _PathError(node, f"{_describe(node)} changes log-probabilities before the loss takes them")
            self._pointwise(call)

    def _pointwise(self, call: Call) -> None:
        if call.op == "tanh":
            self._step("tanh", call.node)
        elif call.op in ("mul", "div"):
            constant = call["other"] if isinstance(call["input"], fx.Node) else call["input"]
            inverted = call.op == "div" and not isinstance(call["input"], fx.Node)
            if isinstance(constant, bool) or not isinstance(constant, (int, float)) or inverted:
                raise _PathError(call.node, f"{_describe(call.node)}: only scaling by a constant number is read")
            if not math.isfinite(constant) or constant == 0 or call.get("rounding_mode") is not None:
                raise _PathError(call.node, f"{_describe(call.node)} by {constant} is no scaling")
            if self.dead and constant < 0:
                raise _PathError(call.node, "logits set to -inf are scaled by a negative number afterwards")
            self.steps.append(f"{call.op}:{float(constant)!r}")
        elif call.op == "add":
            self._add(call)
        else:
            self._mask(call)

    def _step(self, step: str, node: fx.Node) -> None:
        if self.dead:
            raise _PathError(node, f"{step} after logits were set to -inf")
        self.steps.append(step)

    def _add(self, call: Call) -> None:
        vector = call["other"] if _same_shape(call["input"], example_of(call.node)) else call["input"]
        if self.steps or self.dead or self.bias is not None or call.get("alpha", 1) != 1:
            raise _PathError(call.node, "a class vector is added after the logits were scaled, masked or shifted")
        if not self._is_class_vector(vector, call.node):
            raise _PathError(call.node, f"{_describe(call.node)} adds something that is not one number per class")
        self.bias = vector

    def _mask(self, call: Call) -> None:
        if call.op == "where":
            condition = call["condition"]
            keeps = _same_shape(call["input"], example_of(call.node)) and isinstance(call["input"], fx.Node)
            fill = call["other"] if keeps else call["input"]
            dead_value = not keeps
        else:
            condition, fill, dead_value = call["mask"], call["value"], True
        if not self._is_minus_infinity(fill, call.node):
            raise _PathError(call.node, f"{_describe(call.node)} fills with something other than -inf")
        if not self._is_class_vector(condition, call.node):
            raise _PathError(call.node, f"{_describe(call.node)}: its mask is not one flag per class")
        self.dead.append(DeadClasses(mask=condition, value=dead_value))

    def _cut(self, length: int, node: fx.Node) -> None:
        if self.log_softmax:
            raise _PathError(node, "the classes are cut after the log_softmax, which took all of them")
        size = expression(example_of(self.linear.node).shape[-1]) if self.num_classes is None else self.num_classes
        if not isinstance(size, int) and not size.is_Integer:
            raise _PathError(node, "the classes are cut, and how many there are is not a constant")
        length = length if length >= 0 else int(size) + length
        self.num_classes = min(length, int(size))

    # ------------------------------------------------------------------------------------------- writes

    def _writes_into(self, value: fx.Node, reader: fx.Node) -> None:
        """Reads ``value[..., k:] = -inf`` that comes before ``reader``; any other write into the logits fails."""
        for user in value.users:
            if user is reader or value not in written(user):
                continue
            call = read(user)
            if call is None or call.op != "setitem" or self.region.order[user] > self._first_read(reader):
                raise _PathError(user, f"{_describe(user)} writes into the logits")
            self._masked_write(call)
            self.writes.append(user)

    def _first_read(self, reader: fx.Node) -> int:
        """Where in the graph ``reader``, or for a loss made of several nodes the first of them, takes its input."""
        nodes = (reader, *self.form.inner) if reader is self.form.anchor else (reader,)
        return min(map(self.region.order.__getitem__, nodes))

    def _masked_write(self, call: Call) -> None:
        value = example_of(call["input"])
        index = call["index"] if isinstance(call["index"], tuple) else (call["index"],)
        *rows, last = index
        full = all(entry is Ellipsis or entry == slice(None) for entry in rows)
        reaches = Ellipsis in rows or len(index) == value.ndim
        if not full or not reaches or self.class_dim != value.ndim - 1 or self.log_softmax:
            raise _PathError(call.node, "a write into the logits that is not over whole classes")
        if not self._is_minus_infinity(call["value"], call["input"]):
            raise _PathError(call.node, "a write into the logits of something other than -inf")
        if isinstance(last, fx.Node) and self._is_class_vector(last, call["input"], torch.bool):
            self.dead.append(DeadClasses(mask=last))
        elif isinstance(last, slice) and isinstance(last.start, int) and last.stop is None and last.step in (None, 1):
            start = last.start
            if start < 0:
                size = value.shape[-1]
                if not isinstance(size, int):
                    raise _PathError(call.node, "a negative class index where the number of classes is not a constant")
                start += size
            self.dead.append(DeadClasses(start=start))
        else:
            raise _PathError(call.node, "a write into the logits that is not over the last classes or a class mask")

    # ------------------------------------------------------------------------------------------- helpers

    def _is_class_vector(self, vector: Any, logits: fx.Node, dtype: torch.dtype | None = None) -> bool:
        value, like = example(vector), example_of(logits)
        if value is None or value.ndim < 1 or self.class_dim != like.ndim - 1:
            return False
        whole = expression(value.shape[-1]) == expression(like.shape[-1])
        ones = all(expression(size) == 1 for size in value.shape[:-1])
        return whole and ones and (dtype is None or value.dtype == dtype)

    def _is_minus_infinity(self, fill: Any, node: fx.Node) -> bool:
        """-inf, or the dtype's lowest number, whose exponential beside any logit is 0 just the same.

        Label smoothing adds up the logits themselves, where the two differ.
        """
        if isinstance(fill, (fx.Node, bool)) or not isinstance(fill, (int, float)):
            return False
        lowest = torch.finfo(example_of(node).dtype).min
        return fill == -math.inf or (fill == lowest and not self.form.label_smoothing)


def example_of(node: Any) -> torch.Tensor:
    """The example value of a node that is known to have one."""
    value = example(node)
    assert value is not None, node
    return value


def foreign_users(paths: Sequence[LogitsPath], forms: Sequence[LossForm]) -> list[fx.Node]:
    """Users of the logits that belong to none of the paths and losses."""
    anchors = frozenset(form.anchor for form in forms)
    own = anchors.union(*(path.nodes for path in paths), *(form.inner for form in forms))
    return [user for node in own - anchors for user in node.users if user not in own]

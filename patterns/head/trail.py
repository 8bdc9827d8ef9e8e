"""What happens to the logits between a linear and a loss, read from the linear on."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import fx

from structfly.compat import expression
from structfly.patterns.head.chain import (
    Chain,
    ChainStep,
    LeadingClasses,
    Place,
    StepError,
    TensorOperand,
    describe,
    read_steps,
)
from structfly.patterns.head.path import LogitsPath, Obstacle, Reads
from structfly.rewriter.calls import Call, read
from structfly.rewriter.linear import LinearLike, is_cast
from structfly.rewriter.region import Region, example, example_of
from structfly.rewriter.views import RowView, read_view
from structfly.rewriter.writes import unused, written


class _PathError(Exception):
    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(reason)
        self.node, self.reason = node, reason


class TrailReader:
    """Reads a trail forwards, from the linear to the loss."""

    def __init__(self, linear: LinearLike, trail: tuple[fx.Node, ...], form: Reads, region: Region) -> None:
        self.linear, self.trail, self.form, self.region = linear, trail, form, region
        self.views: list[RowView] = []
        self.view_nodes: list[fx.Node] = []
        self.bias = linear.bias
        self.steps: list[ChainStep] = []
        self.num_classes: int | None = None
        self.writes: list[fx.Node] = []
        self.class_dim = 0
        self.log_softmax = False

    def read(self) -> LogitsPath | Obstacle:
        value = example(self.linear.node)
        if value is None:
            return Obstacle(self.linear.node, "the linear has no example value", len(self.trail))
        self.class_dim = self.linear.class_dim % value.ndim
        chain = (self.linear.node, *self.trail)
        try:
            for below, node in zip(chain, (*self.trail, self.form.anchor), strict=True):
                self._writes_into(below, node)
                if node is not self.form.anchor:
                    self._read_one(node, below)
            self._end()
        except _PathError as failure:
            return Obstacle(failure.node, failure.reason, len(self.trail) + 1)
        idle = _made_for_nothing(chain, unused(self.region))
        return LogitsPath(
            linear=self.linear,
            trail=self.trail,
            views=tuple(self.views),
            view_nodes=tuple(self.view_nodes),
            bias=self.bias,
            chain=Chain(tuple(self.steps)),
            num_classes=self.num_classes,
            class_dim=self.class_dim,
            nodes=frozenset((*self.linear.nodes, *self.trail, *self.writes, *idle)),
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

    def _read_one(self, node: fx.Node, below: fx.Node) -> None:
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
                raise _PathError(node, f"{describe(node)} changes log-probabilities before the loss takes them")
            self._pointwise(call, below)

    def _pointwise(self, call: Call, logits: fx.Node) -> None:
        if logits in written(call.node) and self._differs_in_grad_mode(call.node):
            raise _PathError(call.node, f"{describe(call.node)} writes into the logits unseen by differentiation")
        try:
            place = Place(len(self.views), self.class_dim)
            steps = read_steps(call, logits, place, example_of(self.linear.node).dtype)
        except StepError as failure:
            raise _PathError(call.node, str(failure)) from failure
        if not self._is_bias(steps[0], logits):
            self.steps.extend(steps)
            return
        self.bias = steps[0].operands[0].node  # type: ignore[union-attr]

    def _is_bias(self, step: ChainStep, logits: fx.Node) -> bool:
        """Whether a step is the bias of a linear that has none of its own."""
        if step.name != "add" or self.steps or self.bias is not None:
            return False
        (vector,) = step.operands
        plain = isinstance(vector, TensorOperand) and vector.kind == "class"
        return plain and example_of(vector.node).dtype == example_of(logits).dtype  # type: ignore[union-attr]

    def _differs_in_grad_mode(self, node: fx.Node) -> bool:
        """Whether a node is under a no_grad that the loss is not under."""
        return node in self.region.undifferentiated and self.form.anchor not in self.region.undifferentiated

    def _cut(self, length: int, node: fx.Node) -> None:
        if self.log_softmax:
            raise _PathError(node, "the classes are cut after the log_softmax, which took all of them")
        every = example_of(self.linear.node).shape[self.linear.class_dim]
        size = expression(every) if self.num_classes is None else self.num_classes
        if not isinstance(size, int) and not size.is_Integer:
            raise _PathError(node, "the classes are cut, and how many there are is not a constant")
        length = length if length >= 0 else int(size) + length
        self.num_classes = min(length, int(size))

    # ------------------------------------------------------------------------------------------- writes

    def _writes_into(self, value: fx.Node, reader: fx.Node) -> None:
        """Reads ``value[..., k:] = number`` that comes before ``reader``; any other write into the logits fails."""
        for user in value.users:
            if user is reader or value not in written(user):
                continue
            call = read(user)
            if call is None or call.op != "setitem" or self.region.order[user] > self._first_read(reader):
                raise _PathError(user, f"{describe(user)} writes into the logits")
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
        fill = call["value"]
        if not isinstance(fill, (int, float)) or isinstance(fill, bool) or math.isnan(fill):
            raise _PathError(call.node, "a write into the logits of something other than a number")
        # Where a logit is -inf its gradient is 0, whether the write is differentiated or not.
        if fill != -math.inf and self._differs_in_grad_mode(call.node):
            raise _PathError(call.node, f"{describe(call.node)} writes into the logits unseen by differentiation")
        if isinstance(last, fx.Node) and self._is_class_mask(last, value):
            self.steps.append(ChainStep("masked_fill", (TensorOperand(last, "class", True), float(fill))))
        elif isinstance(last, slice) and isinstance(last.start, int) and last.stop is None and last.step in (None, 1):
            start = last.start
            if start < 0:
                size = value.shape[-1]
                if not isinstance(size, int):
                    raise _PathError(call.node, "a negative class index where the number of classes is not a constant")
                start += size
            self.steps.append(ChainStep("where", (LeadingClasses(start), float(fill))))
        else:
            raise _PathError(call.node, "a write into the logits that is not over the last classes or a class mask")

    # ------------------------------------------------------------------------------------------- helpers

    def _is_class_mask(self, mask: fx.Node, logits: torch.Tensor) -> bool:
        value = example(mask)
        if value is None or value.ndim != 1 or value.dtype != torch.bool:
            return False
        return bool(expression(value.shape[0]) == expression(logits.shape[-1]))


def _made_for_nothing(nodes: Sequence[fx.Node], among: Collection[fx.Node]) -> list[fx.Node]:
    """What is made of ``nodes`` and goes nowhere, such as views that a model returns and nobody takes."""
    found = [user for node in nodes for user in node.users if user in among]
    return [*found, *_made_for_nothing(found, among)] if found else []

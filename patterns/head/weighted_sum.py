"""Per-token losses that end in one scalar: ``(loss * mask).sum() / mask.sum()`` and its spellings.

A scalar that is linear in the per-token losses l, S = sum_n w_n l_n, has one upstream factor for all rows, so the
gradients can be made in the forward pass with w as row weights (coefficient class A of the head: one pass, 6NHV).
Reading walks from l to S through linear steps.  Writing sends ones through the same steps: between two sums every step
scales or reshapes, so what comes out is the weight of each loss.

A divergence is often still one number per row and class when it is masked and summed.  As long as no step treats two
classes differently the same reading holds, with the classes as a dimension of size 1 in the ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from structfly.compat import expression, size_checks
from structfly.lowering.head.chunks import wide_dtype
from structfly.rewriter.calls import Call, flat, read
from structfly.rewriter.editor import Editor
from structfly.rewriter.linear import is_cast
from structfly.rewriter.region import example, needs_gradient

_RESHAPES = ("view", "reshape", "flatten", "squeeze", "unsqueeze")
_COPIES = ("contiguous", "clone")


@dataclass(frozen=True)
class Step:
    """One linear step; ``losses`` is its operand that carries the losses."""

    call: Call
    losses: fx.Node


@dataclass(frozen=True)
class WeightedSum:
    """How per-token losses become a scalar.

    Attributes:
        root: the node whose value is the scalar: the last sum or mean.
        steps: the linear steps from the losses to ``root``, in order.
        checks: nodes that only check how many rows a mask picks.
        over_classes: ``root`` is a mean over the classes, too.
    """

    root: fx.Node
    steps: tuple[Step, ...]
    checks: tuple[fx.Node, ...] = ()
    over_classes: bool = False

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The nodes that a rewrite makes superfluous."""
        return (*(step.call.node for step in self.steps), *self.checks)

    @property
    def operands(self) -> tuple[fx.Node, ...]:
        """What the steps take besides the losses."""
        return tuple(node for step in self.steps for node in step.call.node.all_input_nodes if node is not step.losses)


@dataclass(frozen=True)
class Weights:
    """Row weights as nodes.

    Attributes:
        rows: (N,) weights, or None for ones.
        constant: a number that scales the sum.
        count: what the sum is divided by (a mean), or None.
    """

    rows: fx.Node | None
    constant: float
    count: int | fx.Node | None


def read_weighted_sum(losses: fx.Node, class_dim: int | None = None) -> WeightedSum | None:
    """The scalar that ``losses`` end in, or None if they do not end in one.

    Args:
        losses: one loss a row or, if ``class_dim`` says which dimension the classes are, one term a row and class.
    """
    steps: list[Step] = []
    checks: tuple[fx.Node, ...] = ()
    node, picked = losses, False
    while True:
        checks += size_checks(node)
        users = [user for user in node.users if user not in checks]
        if len(users) != 1:
            return None
        call, value = read(users[0]), example(users[0])
        if call is None or value is None or not _is_linear(call, node, class_dim):
            return None
        steps.append(Step(call, node))
        if call.op in ("sum", "mean") and value.ndim == 0 and not (picked and call.op == "mean"):
            return WeightedSum(users[0], tuple(steps), checks, class_dim is not None and call.op == "mean")
        if picked:
            return None  # what follows a pick has as many entries as were picked; only their sum is read
        picked = call.op == "getitem"
        if call.op == "sum" and class_dim is not None:
            if class_dim not in _dims(call, node):
                return None
            class_dim = None
        node = users[0]


def _is_linear(call: Call, losses: fx.Node, class_dim: int | None) -> bool:
    if call.op in ("mul", "div"):
        factor = _factor(call, losses)
        plain = factor is not losses and call.get("rounding_mode") is None and not needs_gradient(factor)
        plain = plain and _same_for_all_classes(factor, losses, class_dim)
        return plain and (call.op == "mul" or call["input"] is losses) and _keeps_shape(call, losses)
    if call["input"] is not losses:
        return False
    if call.op in ("neg", *_COPIES) or is_cast(call):
        return True
    if call.op in _RESHAPES:
        return class_dim is None
    if call.op == "where":
        mask = call["condition"]
        plain = _is_zero(call["other"]) and mask is not losses and _same_for_all_classes(mask, losses, class_dim)
        return plain and _keeps_shape(call, losses)
    if call.op == "masked_fill":
        plain = isinstance(call["mask"], fx.Node) and _same_for_all_classes(call["mask"], losses, class_dim)
        return plain and _is_zero(call["value"])
    if call.op == "getitem":
        return _picks_rows(call, losses, class_dim)
    if call.op == "sum":
        return call.get("dtype") is None
    result = example(call.node)  # a mean over some dimensions would need their sizes
    return call.op == "mean" and result is not None and result.ndim == 0 and call.get("dtype") is None


def _same_for_all_classes(operand: Any, terms: fx.Node, class_dim: int | None) -> bool:
    value, like = example(operand), example(terms)
    if class_dim is None or value is None or like is None:
        return True
    place = class_dim - (like.ndim - value.ndim)
    return place < 0 or expression(value.shape[place]) == 1


def _picks_rows(call: Call, losses: fx.Node, class_dim: int | None) -> bool:
    """``losses[mask]`` with one flag for every row."""
    mask, value = example(call["index"]), example(losses)
    if mask is None or value is None or mask.dtype != torch.bool or class_dim not in (None, value.ndim - 1):
        return False
    return mask.ndim == value.ndim - (class_dim is not None)


def _dims(call: Call, losses: fx.Node) -> tuple[int, ...]:
    value = example(losses)
    assert value is not None
    return tuple(sorted(dim % value.ndim for dim in flat(call.get("dim"))))


def _factor(call: Call, losses: fx.Node) -> Any:
    return call["other"] if call["input"] is losses else call["input"]


def _keeps_shape(call: Call, losses: fx.Node) -> bool:
    before, after = example(losses), example(call.node)
    assert before is not None
    assert after is not None
    return [expression(size) for size in before.shape] == [expression(size) for size in after.shape]


def _is_zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == 0


@dataclass
class _Stage:
    """The steps between two sums: ones that went in, weights that come out, and the sum's dimensions."""

    ones: fx.Node
    weights: fx.Node
    summed: tuple[int, ...] = ()


def write_weights(total: WeightedSum, like: fx.Node, editor: Editor) -> Weights:
    """Insert the nodes that make the row weights of ``total``; ``like`` has the losses' shape, with 1 for classes."""
    value = example(total.steps[0].losses)
    dtype = torch.float32 if value is None else wide_dtype(value.dtype)
    ones = editor.call(torch.ones_like, like, dtype=dtype)
    stages = [_Stage(ones, ones)]
    constant, weighted = 1.0, False
    for step in total.steps:
        call, stage = step.call, stages[-1]
        if call.op == "neg":
            constant = -constant
        elif call.op in ("mul", "div"):
            factor = _factor(call, step.losses)
            if isinstance(factor, fx.Node):
                function = torch.mul if call.op == "mul" else torch.div
                stage.weights = editor.call(function, stage.weights, editor.method("to", factor, dtype))
                weighted = True
            else:
                constant = constant * factor if call.op == "mul" else constant / factor
        elif call.op == "where":
            stage.weights = editor.call(torch.where, call["condition"], stage.weights, 0.0)
            weighted = True
        elif call.op == "masked_fill":
            stage.weights = editor.call(torch.masked_fill, stage.weights, call["mask"], 0.0)
            weighted = True
        elif call.op == "getitem":
            mask = call["index"]
            picked = example(mask)
            assert picked is not None
            if picked.ndim < stage.weights.meta["example_value"].ndim:
                mask = editor.call(torch.unsqueeze, mask, -1)
            stage.weights = editor.call(torch.where, mask, stage.weights, 0.0)
            weighted = True
        elif call.op in _RESHAPES:
            stage.weights = editor.like(call.node, stage.weights, *call.node.args[1:], **call.node.kwargs)
        elif call.op == "sum" and call.node is not total.root:
            stages.append(_next_stage(call, stage, editor))
    count = _count(total, stages[-1], editor)
    if not weighted:
        return Weights(None, constant, count)
    return Weights(editor.call(torch.reshape, _collapse(stages, editor), (-1,)), constant, count)


def _next_stage(call: Call, stage: _Stage, editor: Editor) -> _Stage:
    stage.summed = _dims(call, stage.weights)
    sums = editor.call(torch.sum, stage.weights, stage.summed, call.get("keepdim", False))
    if call.get("keepdim", False):
        stage.summed = ()
    ones = editor.call(torch.ones_like, sums)
    return _Stage(ones, ones)


def _collapse(stages: list[_Stage], editor: Editor) -> fx.Node:
    """Every summand has the weight of its sum."""
    later: fx.Node | None = None
    for stage in reversed(stages):
        weights = stage.weights
        if later is not None:
            for dim in stage.summed:
                later = editor.call(torch.unsqueeze, later, dim)
            weights = editor.call(torch.mul, weights, later)
        later = editor.method("reshape_as", weights, stage.ones)
    assert later is not None
    return later


def _count(total: WeightedSum, stage: _Stage, editor: Editor) -> int | fx.Node | None:
    if total.steps[-1].call.op != "mean":
        return None
    count = stage.weights.meta["example_value"].numel()
    return count if isinstance(count, int) else editor.method("numel", stage.weights)

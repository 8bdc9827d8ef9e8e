"""The anchors: nodes that turn logits, or their log-softmax, into a cross-entropy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx

from structfly.compat import expression
from structfly.rewriter.calls import Call, flat, read
from structfly.rewriter.linear import is_cast
from structfly.rewriter.region import Region, example
from structfly.rewriter.views import VIEWS, view_input


@dataclass(frozen=True)
class LossForm:
    """A loss as written.

    Attributes:
        anchor: the node whose value the rewrite replaces.
        logits: its input: logits, or log-probabilities if ``of_log_softmax``.
        of_log_softmax: the input is a log-softmax.
        target: class indices, shaped as the rows of the logits (with a size-1 class dimension for a gather).
        class_dim: the class dimension of ``logits``.
        reduction: "none", "sum" or "mean".
        ignore_index: None if no target value is ignored.
        label_smoothing: in [0, 1].
        class_weight: (C,) or None.
        negated: the anchor's value is minus the loss (a gathered log-probability).
        inner: nodes between the logits and the anchor that only serve this loss.
        target_dim: a dimension of size 1 that ``target`` has beyond the anchor's value, or None.
    """

    anchor: fx.Node
    logits: fx.Node
    of_log_softmax: bool
    target: fx.Node
    class_dim: int
    reduction: str = "none"
    ignore_index: int | None = None
    label_smoothing: float = 0.0
    class_weight: fx.Node | None = None
    negated: bool = False
    inner: tuple[fx.Node, ...] = ()
    target_dim: int | None = None

    @property
    def options(self) -> tuple[object, ...]:
        """What losses that share a linear must agree on."""
        return (self.ignore_index, self.label_smoothing, self.class_weight, self.of_log_softmax, self.negated)


def loss_forms(region: Region) -> Iterator[LossForm | tuple[fx.Node, str]]:
    """Every anchor of a region: a form, or the anchor with the reason why its form is not supported."""
    sums = [each for call in region.calls if call.op == "add" and (each := _smoothed(call)) is not None]
    yield from sums
    within = {node for each in sums for node in each.inner}
    for call in region.calls:
        node = call.node
        if node in within:
            continue
        if call.op in ("cross_entropy", "nll_loss"):
            if has_soft_targets(call):
                continue  # the rule linear_divergence
            form = _index_loss(call)
            yield form if isinstance(form, LossForm) else (node, form)
        elif call.op in ("gather", "take_along_dim") and is_log_softmax(call["input"]):
            form = _gathered(call)
            yield form if isinstance(form, LossForm) else (node, form)
        elif call.op == "sub":
            difference = _difference(call)
            if difference is not None:
                yield difference


def has_soft_targets(call: Call) -> bool:
    """Whether a cross_entropy's targets are probabilities and not class indices."""
    target = example(call["target"])
    return call.op == "cross_entropy" and target is not None and target.is_floating_point()


def _index_loss(call: Call) -> LossForm | str:
    logits, target = example(call["input"]), example(call["target"])
    if logits is None or target is None:
        return "the logits or targets are not tensors of this graph"
    if call.get("size_average") is not None or call.get("reduce") is not None:
        return "size_average and reduce are deprecated; write reduction= instead"
    weight = call.get("weight")
    weight_value = example(weight)
    if weight_value is not None and weight_value.requires_grad:
        return "the class weights require a gradient, which cross_entropy does not give either"
    smoothing = call.get("label_smoothing", 0.0)
    ignore_index, reduction = call.get("ignore_index", -100), call.get("reduction", "mean")
    if not isinstance(smoothing, (int, float)) or not isinstance(ignore_index, int):
        return "label_smoothing or ignore_index is not a constant"
    return LossForm(
        anchor=call.node,
        logits=call["input"],
        of_log_softmax=call.op == "nll_loss",
        target=call["target"],
        class_dim=0 if logits.ndim == 1 else 1,
        reduction=str(reduction),
        ignore_index=ignore_index,
        label_smoothing=float(smoothing),
        class_weight=weight if isinstance(weight, fx.Node) else None,
    )


def one_class_a_row(call: Call) -> int | str:
    """The class dimension of a gather of one class a row, or why it is none."""
    values, index = example(call["input"]), example(call["index"])
    dim = call.get("dim")
    if values is None or index is None or not isinstance(dim, int) or index.ndim != values.ndim:
        return "a gather whose index does not have the log-probabilities' rank"
    dim %= values.ndim
    for place, (have, want) in enumerate(zip(index.shape, values.shape, strict=True)):
        if expression(have) != (1 if place == dim else expression(want)):
            return "a gather that is not known to take exactly one class from every row"
    return dim


def _gathered(call: Call) -> LossForm | str:
    dim = one_class_a_row(call)
    return dim if isinstance(dim, str) else LossForm(call.node, call["input"], True, call["index"], dim, negated=True)


def _difference(call: Call) -> LossForm | None:
    """``z.gather(-1, t) - z.logsumexp(-1)``, or the other way round.

    None for a difference of anything else: what gathers and logsumexps it has are consumers of their own.
    """
    sides = _sides(call, "logsumexp")
    if sides is None or any(factor != 1.0 for _, factor, _ in sides):
        return None
    (gather, _, gather_nodes), (logsumexp, _, logsumexp_nodes) = sides
    form, value = _gathered(gather), example(call.node)
    if isinstance(form, str):
        return None
    logits, dims = example(form.logits), flat(logsumexp.get("dim"))
    if gather["input"] is not logsumexp["input"] or logits is None or value is None:
        return None
    kept = value.ndim == logits.ndim
    over_classes = len(dims) == 1 and isinstance(dims[0], int) and dims[0] % logits.ndim == form.class_dim
    if not over_classes or not _row_by_row(call, logits, form.class_dim, kept):
        return None
    return replace(
        form,
        anchor=call.node,
        of_log_softmax=False,
        negated=call["input"] is gather_nodes[0],
        inner=(*gather_nodes, *logsumexp_nodes),
        target_dim=None if kept else form.class_dim,
    )


def _smoothed(call: Call) -> LossForm | None:
    """timm's label smoothing: ``a * -log_p.gather(-1, t) + s * -log_p.mean(-1)`` with a + s = 1."""
    sides = _sides(call, "mean")
    if sides is None:
        return None
    (gather, confidence, nodes), (mean, smoothing, others) = sides
    if gather["input"] is not mean["input"] or not is_log_softmax(gather["input"]):
        return None
    form, logits, value = _gathered(gather), example(gather["input"]), example(call.node)
    if isinstance(form, str) or logits is None or value is None or smoothing > 0.0 or confidence > 0.0:
        return None
    dims, kept = flat(mean.get("dim")), value.ndim == logits.ndim
    over_classes = len(dims) == 1 and isinstance(dims[0], int) and dims[0] % logits.ndim == form.class_dim
    whole = math.isclose(confidence + smoothing, -1.0, rel_tol=1e-12)
    if not over_classes or not whole or not _row_by_row(call, logits, form.class_dim, kept):
        return None
    return replace(
        form,
        anchor=call.node,
        label_smoothing=-smoothing,
        negated=False,
        inner=(*nodes, *others),
        target_dim=None if kept else form.class_dim,
    )


# An operand of a sum or difference: what it is made of, its factor, and the nodes down to that.
_Side = tuple[Call, float, tuple[fx.Node, ...]]


def _sides(call: Call, other: str) -> tuple[_Side, _Side] | None:
    """The operands of ``call``, if one is made of a gather and one of ``other``, in this order."""
    sides = [side for operand in (call["input"], call["other"]) if (side := _side(operand, other)) is not None]
    by_op = {side[0].op: side for side in sides}
    return (by_op["gather"], by_op[other]) if len(sides) == 2 and by_op.keys() == {"gather", other} else None


def _side(node: object, other: str) -> _Side | None:
    """What is beneath signs, constant factors, squeezes and casts, if it is a gather or ``other``."""
    nodes: list[fx.Node] = []
    factor = 1.0
    while isinstance(node, fx.Node):
        call = read(node)
        if call is None:
            return None
        nodes.append(node)
        if call.op in ("gather", "take_along_dim", other):
            return replace(call, op=other if call.op == other else "gather"), factor, tuple(nodes)
        node = call.get("input")
        if call.op == "neg":
            factor = -factor
        elif call.op == "mul":
            number, node = (call["other"], node) if isinstance(node, fx.Node) else (node, call["other"])
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                return None
            factor *= number
        elif call.op not in ("squeeze", "contiguous", "clone") and not is_cast(call):
            return None
    return None


def _row_by_row(call: Call, logits: torch.Tensor, class_dim: int, kept: bool) -> bool:
    """Whether both operands of a sum or difference have one number a row, as has its value."""
    rows = [1 if dim == class_dim else expression(size) for dim, size in enumerate(logits.shape)]
    if not kept:
        del rows[class_dim]
    shapes = [[expression(size) for size in shape] for shape in _shapes(call)]
    return all(shape == rows for shape in shapes) and call.get("alpha", 1) == 1


def _shapes(call: Call) -> Iterator[torch.Size]:
    """The shapes of a binary operation's operands and value."""
    for node in (call["input"], call["other"], call.node):
        value = example(node)
        if value is not None:
            yield value.shape


def is_log_softmax(node: object) -> bool:
    """Whether a log-softmax lies beneath views and casts."""
    while isinstance(node, fx.Node):
        call = read(node)
        if call is None:
            return False
        if call.op == "log_softmax":
            return True
        if call.op in VIEWS:
            node = view_input(node)
        elif call.op in ("contiguous", "clone") or is_cast(call):
            node = call["input"]
        else:
            return False
    return False

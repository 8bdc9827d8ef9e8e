"""What else real code makes of a row of logits: log-sum-exp, entropy, argmax, the logits of chosen classes.

Each is read backwards from the node that has one number a row, through softmax, log-softmax and their spellings, to the
logits they were taken of.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import fx

from structfly.patterns.linear_cross_entropy.class_values import (
    class_value,
    keeps_dim,
    one_dim,
    same_logits,
    shape_of,
    signed,
    unexpanded,
)
from structfly.patterns.linear_cross_entropy.loss import LossForm, is_log_softmax, one_class_a_row
from structfly.rewriter.calls import Call, read
from structfly.rewriter.linear import is_cast
from structfly.rewriter.region import Region, example

Kind = Literal["lse", "entropy", "mean_logit", "argmax", "chosen"]


@dataclass(frozen=True)
class StatisticForm:
    """A statistic of rows as written.

    Attributes:
        kind: what the anchor's value is; "mean_logit" is sum_v p_v u_v, lse less entropy.
        negated: it is minus that.
        keeps_dim: the value keeps the class dimension, of size 1.
        index: for "chosen" the classes, shaped as the rows with a class dimension of size 1.
    """

    anchor: fx.Node
    logits: fx.Node
    kind: Kind
    class_dim: int
    inner: tuple[fx.Node, ...]
    negated: bool = False
    keeps_dim: bool = False
    index: fx.Node | None = None
    of_log_softmax: bool = False

    @property
    def statistics(self) -> tuple[str, ...]:
        """What the op has to return for it."""
        return ("lse", "entropy") if self.kind == "mean_logit" else (self.kind,)


def statistic_forms(region: Region) -> Iterator[StatisticForm | LossForm]:
    """Every statistic of a region, and log-probabilities of chosen classes that no log_softmax made."""
    for node in region.graph.nodes:
        call = read(node)
        form = None if call is None or example(node) is None else _READERS.get(call.op, _nothing)(call)
        if form is not None:
            yield form


def _nothing(_: Call) -> None:
    return None


# ------------------------------------------------------------------------------------------------ statistics


def _logsumexp(call: Call) -> StatisticForm | None:
    dim = one_dim(call)
    if dim is None or class_value(call["input"]).kind != "logits":
        return None
    return StatisticForm(call.node, call["input"], "lse", dim, (), keeps_dim=keeps_dim(call))


def _stacked(call: Call) -> StatisticForm | None:
    """``stack([row.logsumexp(-1) for row in z])``, which some write to have less memory at a time."""
    inner: dict[fx.Node, None] = {}
    dim: int | None = None
    source: Any = None
    for number, tensor in enumerate(call["tensors"]):
        lse = read(tensor)
        element = None if lse is None or lse.op != "logsumexp" or keeps_dim(lse) else read(lse["input"])
        if lse is None or element is None or element.op != "getitem" or element["index"] != number:
            return None
        if source not in (None, element["input"]):
            return None
        source, dim = element["input"], one_dim(lse)
        inner.update(dict.fromkeys((lse.node, element.node)))
    split = read(source)
    if split is not None and split.op == "unbind" and split.get("dim", 0) == 0:
        inner[split.node] = None
        source = split["input"]
    shape = shape_of(source)
    if dim is None or call.get("dim", 0) != 0 or not shape or shape[0] != len(call["tensors"]):
        return None
    return StatisticForm(call.node, source, "lse", dim + 1, tuple(inner))


def _argmax(call: Call) -> StatisticForm | None:
    dim = one_dim(call)
    return None if dim is None else _largest(call.node, call, dim, ())


def _element(call: Call) -> StatisticForm | None:
    """The indices of ``z.max(-1)``."""
    source = read(call["input"])
    if source is None or source.op != "max" or call["index"] != 1:
        return None
    dim = one_dim(source)
    return None if dim is None else _largest(call.node, source, dim, (source.node,))


def _largest(anchor: fx.Node, call: Call, dim: int, nodes: tuple[fx.Node, ...]) -> StatisticForm | None:
    value = class_value(call["input"])
    if value.dim not in (None, dim):
        return None
    inner = (*nodes, *value.nodes)
    return StatisticForm(anchor, value.logits, "argmax", dim, inner, keeps_dim=keeps_dim(call))


def _gather(call: Call) -> StatisticForm | LossForm | None:
    """Chosen logits; or chosen log-probabilities of ``z - z.logsumexp(-1, keepdim=True)``."""
    dim = one_class_a_row(call)
    value = class_value(call["input"])
    if isinstance(dim, str) or value.kind == "p" or is_log_softmax(call["input"]):
        return None
    index, nodes = unexpanded(call["index"])
    if value.kind == "log_p":
        if value.dim != dim:
            return None
        inner = (*value.nodes, *nodes)
        return LossForm(call.node, value.logits, False, index, dim, negated=True, inner=inner)
    return StatisticForm(call.node, call["input"], "chosen", dim, nodes, keeps_dim=True, index=index)


def _sum(call: Call) -> StatisticForm | None:
    """``(p * log_p).sum(-1)``, ``entr(p).sum(-1)``, and ``(p * z).sum(-1)``, with signs anywhere."""
    dim = one_dim(call)
    if dim is None or call.get("dtype") is not None:
        return None
    sign, node, nodes = signed(call["input"])
    product = read(node)
    if product is None:
        return None
    if product.op == "entr":
        value = class_value(product["input"])
        if value.kind != "p" or value.dim != dim:
            return None
        inner = (*nodes, product.node, *value.nodes)
        form = StatisticForm(call.node, value.logits, "entropy", dim, inner, negated=sign < 0)
        return replace(form, keeps_dim=keeps_dim(call))
    if product.op != "mul":
        return None
    factors = [signed(product["input"]), signed(product["other"])]
    for (sign_p, p_node, nodes_p), (sign_u, u_node, nodes_u) in (factors, factors[::-1]):
        p, u = class_value(p_node), class_value(u_node)
        shared = same_logits(p.logits, u.logits)
        if p.kind == "p" and p.dim == dim and u.kind != "p" and u.dim in (None, dim) and shared is not None:
            inner = (*nodes, product.node, *nodes_p, *p.nodes, *nodes_u, *u.nodes, *shared)
            sign *= sign_p * sign_u * (-1 if u.kind == "log_p" else 1)
            kind: Kind = "entropy" if u.kind == "log_p" else "mean_logit"
            return StatisticForm(call.node, p.logits, kind, dim, inner, negated=sign < 0, keeps_dim=keeps_dim(call))
    return None


def _difference(call: Call) -> StatisticForm | None:
    """``z.logsumexp(-1) - (p * z).sum(-1)``, the entropy without log-probabilities, or its negative."""
    sides = [_number(call["input"]), _number(call["other"])]
    for negated, (lse, mean) in ((False, sides), (True, sides[::-1])):
        if lse is None or mean is None or call.get("alpha", 1) != 1:
            continue
        plain = lse[0].kind == "lse" and mean[0].kind == "mean_logit" and not mean[0].negated
        shared = same_logits(lse[0].logits, mean[0].logits)
        shapes = {shape_of(node) for node in (call["input"], call["other"], call.node)}
        if plain and shared is not None and lse[0].class_dim == mean[0].class_dim and len(shapes) == 1:
            inner = (*lse[1], *mean[1], *mean[0].inner, *shared)
            kept = example(call.node), example(mean[0].logits)
            has_dim = kept[0] is not None and kept[1] is not None and kept[0].ndim == kept[1].ndim
            return replace(mean[0], anchor=call.node, kind="entropy", inner=inner, negated=negated, keeps_dim=has_dim)
    return None


def _number(node: object) -> tuple[StatisticForm, tuple[fx.Node, ...]] | None:
    """The logsumexp or sum beneath squeezes and casts, and the nodes down to it, itself included."""
    nodes: list[fx.Node] = []
    while isinstance(node, fx.Node):
        call = read(node)
        if call is None:
            return None
        nodes.append(node)
        if call.op in ("logsumexp", "sum"):
            form = _logsumexp(call) if call.op == "logsumexp" else _sum(call)
            return None if form is None else (form, tuple(nodes))
        if call.op not in ("squeeze", "contiguous", "clone") and not is_cast(call):
            return None
        node = call["input"]
    return None


_READERS: dict[str, Any] = {
    "logsumexp": _logsumexp,
    "stack": _stacked,
    "argmax": _argmax,
    "getitem": _element,
    "gather": _gather,
    "take_along_dim": _gather,
    "sum": _sum,
    "sub": _difference,
}

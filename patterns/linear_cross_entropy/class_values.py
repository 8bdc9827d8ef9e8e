"""What a node holds of every class of a row: logits, probabilities or log-probabilities, in real code's spellings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import fx

from structfly.compat import expression
from structfly.rewriter.calls import Call, read
from structfly.rewriter.linear import is_cast
from structfly.rewriter.region import example


@dataclass(frozen=True)
class ClassValue:
    """What a node holds of every class: logits, probabilities or log-probabilities.

    Attributes:
        kind: which.
        logits: the logits: the node itself, if nothing else is known of it.
        dim: the dimension the softmax went over, None for logits.
        nodes: from the node down to the logits, without these.
    """

    kind: Literal["logits", "p", "log_p"]
    logits: fx.Node
    dim: int | None = None
    nodes: tuple[fx.Node, ...] = ()


def class_value(node: Any) -> ClassValue:
    """What ``node`` holds, as far as is known; logits if nothing is."""
    call = read(node)
    if call is None:
        return ClassValue("logits", node)
    if call.op in ("softmax", "log_softmax"):
        return _softmax(call)
    if call.op == "sub":
        return _less_logsumexp(call)
    source = call.get("input")
    if call.op == "getitem":
        source = _broadcast(node)
        beneath: tuple[Any, ...] = () if source is None else (call["input"],)
    else:
        beneath = ()
    if not isinstance(source, fx.Node):
        return ClassValue("logits", node)
    value = class_value(source)
    nodes = (node, *beneath, *value.nodes)
    same = call.op in ("contiguous", "clone", "detach", "getitem") or is_cast(call)
    if value.kind == "log_p" and call.op == "clamp" and call.get("max") is None:
        same = call.get("min") == torch.finfo(_dtype(source)).min  # what torch.distributions does to a -inf
    if value.kind != "logits" and same:
        return replace(value, nodes=nodes)
    if (value.kind, call.op) in (("log_p", "exp"), ("p", "log")):
        return replace(value, kind="p" if call.op == "exp" else "log_p", nodes=nodes)
    if call.op == "getitem" and source is not None:
        return replace(value, nodes=nodes)
    return ClassValue("logits", node)


def _softmax(call: Call) -> ClassValue:
    """Of logits, or of log-probabilities, whose softmax is that of the logits."""
    value, dim = class_value(call["input"]), call.get("dim")
    tensor = example(call["input"])
    if not isinstance(dim, int) or tensor is None or value.kind == "p" or value.dim not in (None, dim % tensor.ndim):
        return ClassValue("logits", call.node)
    kind: Literal["p", "log_p"] = "p" if call.op == "softmax" else "log_p"
    return ClassValue(kind, value.logits, dim % tensor.ndim, (call.node, *value.nodes))


def _less_logsumexp(call: Call) -> ClassValue:
    """``z - z.logsumexp(-1, keepdim=True)``."""
    lse = read(call["other"])
    if lse is None or lse.op != "logsumexp" or not keeps_dim(lse) or call.get("alpha", 1) != 1:
        return ClassValue("logits", call.node)
    dim = one_dim(lse)
    shared = same_logits(call["input"], lse["input"]) if isinstance(call["input"], fx.Node) else None
    if dim is None or shared is None:
        return ClassValue("logits", call.node)
    return ClassValue("log_p", call["input"], dim, (call.node, lse.node, *shared))


def same_logits(first: fx.Node, second: fx.Node) -> tuple[fx.Node, ...] | None:
    """The casts and copies by which two nodes differ if they hold the same logits, else None.

    The first is what is kept; those above a common node that only the second needs are what it costs.
    """
    below, nodes = [first], []
    while (source := _uncast(below[-1])) is not None:
        below.append(source)
    node: fx.Node | None = second
    while node is not None and node not in below:
        nodes.append(node)
        node = _uncast(node)
    return None if node is None else tuple(nodes)


def _uncast(node: fx.Node) -> fx.Node | None:
    call = read(node)
    if call is None or not (call.op in ("contiguous", "clone", "detach") or is_cast(call)):
        return None
    source = call["input"]
    return source if isinstance(source, fx.Node) else None


def signed(node: Any) -> tuple[int, Any, tuple[fx.Node, ...]]:
    """The sign in front of a value, the value, and the nodes that make the sign, and casts, above it."""
    sign, nodes = 1, []
    while (call := read(node)) is not None and (call.op in ("neg", "contiguous", "clone") or is_cast(call)):
        if call.op != "neg" and class_value(node).kind != "logits":
            break
        nodes.append(node)
        sign *= -1 if call.op == "neg" else 1
        node = call["input"]
    return sign, node, tuple(nodes)


def _broadcast(node: fx.Node) -> fx.Node | None:
    """The tensor that an element of broadcast_tensors is, where it had that shape before."""
    call = read(node)
    source = None if call is None or call.op != "getitem" else read(call["input"])
    if call is None or source is None or source.op != "broadcast_tensors" or not isinstance(call["index"], int):
        return None
    tensors = source["tensors"]
    tensor = tensors[call["index"]]
    return tensor if shape_of(tensor) == shape_of(node) else None


def unexpanded(index: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """An index without the expansion to all classes and back that torch.distributions gives it, and its nodes."""
    cut = read(index)
    if cut is None or cut.op != "getitem" or cut["index"] != (Ellipsis, slice(None, 1, None)):
        return index, ()
    element = read(cut["input"])
    source = None if element is None or element.op != "getitem" else read(element["input"])
    if element is None or source is None or source.op != "broadcast_tensors":
        return index, ()
    tensor = source["tensors"][element["index"]]
    if shape_of(tensor) != shape_of(index):
        return index, ()
    return tensor, (index, element.node, source.node)


def one_dim(call: Call) -> int | None:
    """The one dimension a reduction goes over, counted from the front."""
    tensor, dim = example(call["input"]), call.get("dim")
    if isinstance(dim, (tuple, list)) and len(dim) == 1:
        (dim,) = dim
    if tensor is None or not isinstance(dim, int) or isinstance(dim, bool) or tensor.ndim == 0:
        return None
    return dim % tensor.ndim


def keeps_dim(call: Call) -> bool:
    """Whether a reduction keeps the dimension it goes over, with size 1."""
    return call.get("keepdim", False) is True


def shape_of(node: object) -> tuple[object, ...] | None:
    """The shape of a node's value, symbols as expressions; None for what is no tensor."""
    value = example(node)
    return None if value is None else tuple(map(expression, value.shape))


def _dtype(node: fx.Node) -> torch.dtype:
    value = example(node)
    assert value is not None
    return value.dtype

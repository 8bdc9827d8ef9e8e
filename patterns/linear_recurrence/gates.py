"""Gates whose products are cumulated, of themselves or as the sums of their logarithms."""

from __future__ import annotations

from typing import NamedTuple

from torch import fx

from structfly.patterns.linear_recurrence.expressions import Expression, Operation, neg
from structfly.patterns.linear_recurrence.whole import Source
from structfly.rewriter.calls import read
from structfly.rewriter.region import example


class Cumulated(NamedTuple):
    """A cumulative operation of a tensor along a dimension."""

    node: fx.Node
    source: fx.Node
    dim: int


def cumulated(node: object, op: str) -> Cumulated | None:
    """What a node cumulates by ``op``, in its own dtype."""
    call = read(node)
    if call is None or call.op != op or call.get("dtype") is not None or not isinstance(call["dim"], int):
        return None
    tensor = example(call["input"])
    return None if tensor is None else Cumulated(call.node, call["input"], call["dim"] % tensor.ndim)


def exponential_of(logarithm: fx.Node) -> Source:
    """exp(l), which is a sigmoid where l is the logarithm of one."""
    call = read(logarithm)
    if call is not None and call.op == "logsigmoid":
        return Source(call["input"], lambda value: Operation("sigmoid", (("input", value),)))
    inner = read(call["input"]) if call is not None and call.op == "neg" else None
    if inner is not None and inner.op == "softplus" and inner.get("beta", 1) == 1 and inner.get("threshold", 20) >= 20:
        return Source(inner["input"], lambda value: Operation("sigmoid", (("input", neg(value)),)))
    return Source(logarithm, exponential)


def exponential(value: Expression) -> Expression:
    return Operation("exp", (("input", value),))

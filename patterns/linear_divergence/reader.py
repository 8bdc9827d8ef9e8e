"""Reads every node of a graph, operands first, as one of the forms of :mod:`.readings`, where it has one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from structfly.compat import expression
from structfly.patterns.linear_cross_entropy.loss import has_soft_targets
from structfly.patterns.linear_divergence.readings import (
    Constant,
    Distribution,
    Divergence,
    Logs,
    Nodes,
    Probabilities,
    Reading,
    Stacked,
    log_of_sum,
    mixture,
    product,
)
from structfly.rewriter.calls import Call, flat, read
from structfly.rewriter.linear import is_cast
from structfly.rewriter.region import Region, example, needs_gradient
from structfly.rewriter.writes import written

_REDUCTIONS = {"none": "", "sum": "sum", "batchmean": "batchmean", "mean": "mean"}


def divergences(region: Region) -> Iterator[tuple[fx.Node, Divergence | str]]:
    """The nodes that are divergences and not part of a larger one; or losses and why they are not read as one."""
    reader = _Reader()
    for call in region.calls:
        reader.read(call)
    known = reader.known
    for node, reading in known.items():
        if isinstance(reading, Divergence):
            larger = (known.get(user) for user in node.users)
            if not any(isinstance(other, Divergence) and node in other.nodes for other in larger):
                yield node, reading
    yield from reader.failures.items()


class _Reader:
    def __init__(self) -> None:
        self.known: dict[fx.Node, Reading] = {}
        self.failures: dict[fx.Node, str] = {}

    def read(self, call: Call) -> None:
        node, reading = call.node, self._read(call)
        if reading is None or written(node):  # what is written in place has two meanings
            return
        if isinstance(reading, (Logs, Probabilities, Divergence)):
            if not needs_gradient(node) and any(each.gradient for each in reading.distributions):
                reading = reading.renamed(lambda each: each.detached)  # a detach, or code under no_grad
            reading = replace(reading, nodes=reading.nodes | {node})
        self.known[node] = reading

    def _read(self, call: Call) -> Reading | None:
        op = call.op
        if op in ("softmax", "log_softmax"):
            return _softmax(call)
        if op == "exp":
            return self._exp(call)
        if op == "log":
            return self._log(call)
        if op == "neg":
            return _scaled(self.known.get(call["input"]), -1.0)
        if op in ("mul", "div"):
            return self._mul(call) if op == "mul" else self._div(call)
        if op in ("add", "sub"):
            return self._add(call, 1.0 if op == "add" else -1.0)
        if op in ("stack", "logsumexp", "logaddexp"):
            return self._mixture(call)
        if op == "kl_div":
            return self._kl_div(call)
        if op == "cross_entropy" and has_soft_targets(call):
            return self._cross_entropy(call)
        if op == "sum":
            return self._sum(call)
        if op == "tensor":
            return _constant(call)
        source = self.known.get(call.get("input"))
        keeps = source is not None and (op in ("contiguous", "clone", "detach") or is_cast(call))
        return source if keeps else None

    # ------------------------------------------------------------------------------------------- pointwise

    def _exp(self, call: Call) -> Reading | None:
        logs = self._logs(call["input"])
        if logs is None or logs.offset or list(logs.terms.values()) != [1.0]:
            return None
        return Probabilities(dict(logs.terms), logs.nodes)

    def _log(self, call: Call) -> Reading | None:
        source = self.known.get(call["input"])
        if isinstance(source, Constant):
            return Constant(source.value.log())
        probabilities = self._probabilities(call["input"])
        return None if probabilities is None else log_of_sum(probabilities, frozenset())

    def _mul(self, call: Call) -> Reading | None:
        first, second = call["input"], call["other"]
        for number, other in ((first, second), (second, first)):
            factor = self._number(number)
            if factor is not None:
                return _scaled(self.known.get(other), factor)
        for one, two in ((first, second), (second, first)):
            logs = self.known.get(two)
            if isinstance(logs, Logs) and _same_shapes(one, two, call.node):
                probabilities = self._probabilities(one)
                if probabilities is not None:
                    return product(probabilities, logs, frozenset())
        return None

    def _div(self, call: Call) -> Reading | None:
        divisor = self._number(call["other"])
        if divisor is None or call.get("rounding_mode") is not None or float(divisor) == 0.0:
            return None
        return _scaled(self.known.get(call["input"]), 1.0 / divisor)

    def _add(self, call: Call, sign: float) -> Reading | None:
        first, second = call["input"], call["other"]
        if call.get("alpha", 1) != 1:
            return None
        numbers = (self._number(first), self._number(second))
        if numbers[0] is not None and numbers[1] is not None:
            return Constant(torch.as_tensor(numbers[0] + sign * numbers[1]))
        if numbers[0] is not None or numbers[1] is not None:
            logs = self.known.get(first if numbers[0] is None else second)
            if not isinstance(logs, Logs):
                return None
            if numbers[0] is None:
                return logs.shifted(sign * float(numbers[1] or 0.0))
            return logs.scaled(sign).shifted(float(numbers[0]))
        one, two = self.known.get(first), self.known.get(second)
        if (one is None and two is None) or not _same_shapes(first, second, call.node):
            return None
        if isinstance(one, Divergence) and isinstance(two, Divergence):
            return one.plus(two.scaled(sign))
        if isinstance(one, Probabilities) or isinstance(two, Probabilities):
            probabilities = self._probabilities(first), self._probabilities(second)
            if probabilities[0] is not None and probabilities[1] is not None:
                return probabilities[0].plus(probabilities[1].scaled(sign))
        elif isinstance(one, Logs) or isinstance(two, Logs):
            logs_of = self._logs(first), self._logs(second)
            if logs_of[0] is not None and logs_of[1] is not None:
                return logs_of[0].plus(logs_of[1].scaled(sign))
        return None

    def _mixture(self, call: Call) -> Reading | None:
        if call.op == "logaddexp":
            pair = self._logs(call["input"]), self._logs(call["other"])
            alike = _same_shapes(call["input"], call["other"])
            return mixture((pair[0], pair[1]), frozenset()) if alike and pair[0] and pair[1] else None
        if call.op == "stack":
            members = tuple(self.known.get(each) for each in call["tensors"])
            value, dim = example(call.node), call.get("dim", 0)
            if value is None or not isinstance(dim, int) or not all(isinstance(each, Logs) for each in members):
                return None
            return Stacked(members, dim % value.ndim, frozenset({call.node}))  # type: ignore[arg-type]
        stacked, value = self.known.get(call["input"]), example(call["input"])
        dims = flat(call.get("dim"))
        if not isinstance(stacked, Stacked) or value is None or call.get("keepdim", False):
            return None
        one = len(dims) == 1 and isinstance(dims[0], int) and dims[0] % value.ndim == stacked.dim
        return mixture(stacked.members, stacked.nodes) if one else None

    # ------------------------------------------------------------------------------------------- losses and sums

    def _kl_div(self, call: Call) -> Reading | None:
        logs, target, reduction = call["input"], call["target"], _REDUCTIONS.get(str(call.get("reduction", "mean")))
        log_q = self._logs(logs)
        q: Probabilities | None
        if call.get("log_target", False):
            of_target = self._logs(target)
            single = of_target is not None and not of_target.offset and list(of_target.terms.values()) == [1.0]
            q = Probabilities(dict(of_target.terms), of_target.nodes) if of_target is not None and single else None
        else:
            q = self._probabilities(target)
        if call.get("size_average") is not None or call.get("reduce") is not None or reduction is None:
            reason = "size_average and reduce are deprecated; write reduction= instead"
        elif not _same_shapes(logs, target):
            reason = "kl_div of an input and a target of different shapes"
        elif log_q is None or q is None or list(q.terms.values()) != [1.0] or log_q.offset:
            reason = "kl_div of something that is not read as log-probabilities and a distribution"
        elif not any(base.form == "logits" for each in (*log_q.terms, *q.terms) for base in each.bases):
            reason = "kl_div of two tensors neither of which is a softmax in this graph"
        else:
            (weight,) = q.terms
            made = product(q, Logs({weight: 1.0}, q.nodes).plus(log_q.scaled(-1.0)), frozenset())
            return None if made is None else replace(made, reduction=reduction)
        self.failures[call.node] = reason
        return None

    def _cross_entropy(self, call: Call) -> Reading | None:
        logits, target, reduction = example(call["input"]), call["target"], str(call.get("reduction", "mean"))
        smoothing, q = call.get("label_smoothing", 0.0), self._probabilities(target)
        if call.get("size_average") is not None or call.get("reduce") is not None:
            reason = "size_average and reduce are deprecated; write reduction= instead"
        elif call.get("weight") is not None:
            reason = "class weights with targets that are probabilities; multiply the targets by them instead"
        elif not isinstance(smoothing, (int, float)):
            reason = "label_smoothing is not a constant"
        elif logits is None or q is None or len(q.terms) != 1 or reduction not in ("none", "sum", "mean"):
            reason = "cross_entropy of something that is not read as logits and a distribution"
        elif smoothing and list(q.terms.values()) != [1.0]:
            reason = "label smoothing of targets that are scaled"
        else:
            class_dim = 0 if logits.ndim == 1 else 1
            student = Distribution("logits", call["input"], class_dim, needs_gradient(call["input"]))
            made = product(q, Logs({student: -1.0}, frozenset()), frozenset())
            names = {"none": "rows", "sum": "sum", "mean": "row_mean"}
            return None if made is None else replace(made, reduction=names[reduction], label_smoothing=float(smoothing))
        self.failures[call.node] = reason
        return None

    def _sum(self, call: Call) -> Reading | None:
        source, value, result = self.known.get(call["input"]), example(call["input"]), example(call.node)
        if not isinstance(source, Divergence) or source.reduction or value is None or result is None:
            return None
        if call.get("dtype") is not None:
            return None
        if call.get("dim") is None:
            return replace(source, reduction="sum")
        dims = [dim % value.ndim for dim in flat(call["dim"])]
        class_dim = next((base.class_dim for base in source.bases if base.class_dim is not None), None)
        if dims != [class_dim]:
            return None
        return replace(source, reduction="rows", kept=bool(call.get("keepdim", False)))

    # ------------------------------------------------------------------------------------------- operands

    def _number(self, value: Any) -> float | torch.Tensor | None:
        """A number, or a 0-d tensor that the graph makes of numbers, which has that tensor's rounding."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        reading = self.known.get(value) if isinstance(value, fx.Node) else None
        return reading.value if isinstance(reading, Constant) else None

    def _logs(self, node: Any) -> Logs | None:
        """A node as log-probabilities: as it is read, or a tensor as it is."""
        reading = self.known.get(node)
        if isinstance(reading, Logs):
            return reading
        if reading is not None or not _is_tensor(node):
            return None
        source, _, nodes = _beneath(node, scalings=False)
        return Logs({Distribution("log_probabilities", source, None, needs_gradient(source)): 1.0}, nodes)

    def _probabilities(self, node: Any) -> Probabilities | None:
        """A node as probabilities: as it is read, or a tensor as it is, beneath changes of sign and scale."""
        reading = self.known.get(node)
        if isinstance(reading, Probabilities):
            return reading
        if reading is not None or not _is_tensor(node):
            return None
        source, factor, nodes = _beneath(node, scalings=True)
        under = self.known.get(source)
        if isinstance(under, Probabilities):
            return replace(under.scaled(factor), nodes=under.nodes | nodes)
        return Probabilities({Distribution("probabilities", source, None, needs_gradient(source)): factor}, nodes)


def _softmax(call: Call) -> Reading | None:
    value, dim = example(call["input"]), call.get("dim")
    if value is None or not isinstance(dim, int) or value.ndim == 0:
        return None
    terms = {Distribution("logits", call["input"], dim % value.ndim, needs_gradient(call.node)): 1.0}
    return Logs(terms, frozenset()) if call.op == "log_softmax" else Probabilities(terms, frozenset())


def _constant(call: Call) -> Constant | None:
    value, data = example(call.node), call["data"]
    if value is None or value.ndim or isinstance(data, (bool, fx.Node)) or not isinstance(data, (int, float)):
        return None
    return Constant(torch.tensor(data, dtype=value.dtype))


def _scaled(reading: Reading | None, factor: float | torch.Tensor) -> Reading | None:
    if isinstance(reading, Constant):
        return Constant(reading.value * factor)
    scalable = isinstance(reading, (Logs, Probabilities, Divergence)) and float(factor) != 0.0
    return reading.scaled(float(factor)) if scalable else None  # type: ignore[union-attr]


def _beneath(node: fx.Node, *, scalings: bool) -> tuple[fx.Node, float, Nodes]:
    """The tensor beneath exact casts and, if asked for, changes of sign and scale; their factor; their nodes."""
    factor, nodes = 1.0, []
    while not written(node):
        call = read(node)
        if call is None:
            break
        operand, by = call.get("input"), 1.0
        if call.op in ("mul", "div") and scalings and isinstance(operand, fx.Node):
            by = call["other"]
            if isinstance(by, bool) or not isinstance(by, (int, float)) or by == 0 or call.get("rounding_mode"):
                break
            by = 1.0 / by if call.op == "div" else by
        elif call.op == "neg" and scalings:
            by = -1.0
        elif not is_exact_cast(call):
            break
        factor *= by
        nodes.append(node)
        node = operand
    return node, factor, frozenset(nodes)


def is_exact_cast(call: Call) -> bool:
    """Whether a cast keeps every value of a 16-bit tensor."""
    result, source = example(call.node), example(call.get("input"))
    narrow = (torch.bfloat16, torch.float16)
    return (
        is_cast(call)
        and result is not None
        and source is not None
        and source.dtype in narrow
        and result.dtype == torch.float32
    )


def _is_tensor(node: Any) -> bool:
    value = example(node)
    return value is not None and value.is_floating_point() and value.ndim > 0


def _same_shapes(*nodes: Any) -> bool:
    shapes = []
    for node in nodes:
        value = example(node)
        if value is None:
            return False
        shapes.append([expression(size) for size in value.shape])
    return all(shape == shapes[0] for shape in shapes)

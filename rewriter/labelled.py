"""Products of two tensors, their dimensions labelled, however they are written: as products of matrices, by ``einsum``,
or as sums of elementwise products."""

from __future__ import annotations

import string
from typing import NamedTuple

import sympy
from torch import Tensor, fx

from structfly.compat import expression
from structfly.rewriter.calls import Call, flat, read
from structfly.rewriter.region import example
from structfly.rewriter.writes import written

ONE = "one "
"""How labels begin of dimensions of size 1, along which the other operand is broadcast."""


class Labelled(NamedTuple):
    """out = sum over the labels that are not in ``out`` of one operand times the other.

    Attributes:
        operands: both.
        terms: the labels of their dimensions.
        out: those of the product's.
        nodes: what computes it, the product first.
    """

    operands: tuple[fx.Node, fx.Node]
    terms: tuple[tuple[str, ...], tuple[str, ...]]
    out: tuple[str, ...]
    nodes: tuple[fx.Node, ...]


def read_labelled(call: Call) -> Labelled | None:
    """The product that a call makes, or None."""
    reader = _READERS.get(call.op)
    return None if reader is None or written(call.node) else reader(call)


def _values(*operands: object) -> list[Tensor] | None:
    """The examples of both operands, if both are tensors."""
    values = [value for value in map(example, operands) if value is not None]
    return values if len(values) == 2 else None


def _matmul(call: Call) -> Labelled | None:
    one, other = call["input"], call["other"] if call.op == "matmul" else call["mat2"]
    values = _values(one, other)
    if values is None or min(value.ndim for value in values) < 2:
        return None
    most = max(value.ndim for value in values)
    letters = tuple(string.ascii_letters[: most - 2])
    left, right = ((*letters[most - value.ndim :], *last) for value, last in zip(values, ("12", "23"), strict=True))
    return Labelled((one, other), (left, right), (*letters, "1", "3"), (call.node,))


def _sum(call: Call) -> Labelled | None:
    """The sum of elementwise products over some dimensions."""
    product, dims = read(call["input"]), call.get("dim")
    if product is None or product.op != "mul" or written(product.node) or dims is None:
        return None
    one, other = product["input"], product["other"]
    values, total, result = _values(one, other), example(product.node), example(call.node)
    if values is None or total is None or result is None or call.get("keepdim") or "dtype" in call.arguments:
        return None
    if len({each.dtype for each in (*values, result)}) > 1:
        return None
    summed = {int(dim) % total.ndim for dim in flat(dims)}
    sizes = [(sympy.Integer(1),) * (total.ndim - value.ndim) + tuple(map(expression, value.shape)) for value in values]
    left, right = (
        tuple(
            f"{ONE}{place}" if size == 1 and beside != 1 else str(place)
            for place, (size, beside) in enumerate(zip(own, others, strict=True))
        )[total.ndim - value.ndim :]
        for own, others, value in zip(sizes, reversed(sizes), values, strict=True)
    )
    out = tuple(str(place) for place in range(total.ndim) if place not in summed)
    return Labelled((one, other), (left, right), out, (call.node, product.node))


def _einsum(call: Call) -> Labelled | None:
    operands = flat(call["operands"])
    values = _values(*operands) if len(operands) == 2 else None
    left, arrow, out = str(call["equation"]).replace(" ", "").partition("->")
    terms = left.split(",")
    if values is None or not arrow or len(terms) != 2:
        return None
    hidden: tuple[str, ...] = ()
    labels = []
    for term, value in zip(terms, values, strict=True):
        before, dots, behind = term.partition("...")
        more = value.ndim - len(before) - len(behind) if dots else 0
        if more < 0 or (hidden and more):  # dots in both operands broadcast
            return None
        named = tuple(f"...{index}" for index in range(more))
        hidden = hidden or named
        labels.append((*before, *named, *behind))
    before, dots, behind = out.partition("...")
    out_labels = (*before, *hidden, *behind) if dots else tuple(out)
    if any(len(set(each)) < len(each) for each in (*labels, out_labels)):
        return None
    return Labelled(operands, (labels[0], labels[1]), out_labels, (call.node,))


_READERS = {"matmul": _matmul, "bmm": _matmul, "einsum": _einsum, "sum": _sum}

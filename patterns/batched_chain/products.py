"""Batched products in one form: which dimensions of the data are rows, batches and contracted, and which are new."""

from __future__ import annotations

import string
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from structfly.rewriter.calls import Call, flat, read
from structfly.rewriter.region import example
from structfly.rewriter.writes import written


@dataclass(frozen=True)
class Product:
    """``node`` = sum over labels that are not in ``out`` of data[``data_labels``] factor[``factor_labels``].

    Attributes:
        node: the product.
        data, factor: its operands.
        data_labels, factor_labels, out_labels: one label a dimension.
    """

    node: fx.Node
    data: fx.Node
    factor: fx.Node
    data_labels: tuple[str, ...]
    factor_labels: tuple[str, ...]
    out_labels: tuple[str, ...]


def read_products(node: fx.Node) -> Iterator[Product]:
    """Both readings of a batched product, by which operand is the factor; none of what has no batch."""
    call = read(node)
    if call is None or written(node) or example(node) is None:
        return
    labelled = _matmul(call) if call.op in ("matmul", "bmm") else _einsum(call) if call.op == "einsum" else None
    if labelled is None:
        return
    operands, terms, out = labelled
    for data, factor in ((0, 1), (1, 0)):
        batches = set(terms[data]) & set(terms[factor]) & set(out)
        contracted = (set(terms[data]) & set(terms[factor])) - set(out)
        if batches and contracted and set(out) | contracted == set(terms[data]) | set(terms[factor]):
            yield Product(node, operands[data], operands[factor], terms[data], terms[factor], out)


_Labelled = tuple[list[fx.Node], list[tuple[str, ...]], tuple[str, ...]]


def _matmul(call: Call) -> _Labelled | None:
    operands = [call["input"], call["other"] if call.op == "matmul" else call["mat2"]]
    values = [example(operand) for operand in operands]
    if values[0] is None or values[1] is None or min(values[0].ndim, values[1].ndim) < 3:
        return None
    most = max(values[0].ndim, values[1].ndim)
    letters = string.ascii_letters[: most - 2]
    terms = []
    for value, last in zip(values, ("12", "23"), strict=True):
        assert value is not None
        terms.append((*letters[most - value.ndim :], *last))
    return operands, terms, (*letters, "1", "3")


def _einsum(call: Call) -> _Labelled | None:
    operands = list(flat(call["operands"]))
    values = [example(operand) for operand in operands]
    equation = str(call["equation"]).replace(" ", "")
    left, arrow, out = equation.partition("->")
    terms = left.split(",")
    if not arrow or len(terms) != 2 or len(operands) != 2 or any(value is None for value in values):
        return None
    hidden: tuple[str, ...] = ()
    read_terms = []
    for term, value in zip(terms, values, strict=True):
        assert value is not None
        before, dots, behind = term.partition("...")
        more = value.ndim - len(before) - len(behind) if dots else 0
        if more < 0 or (hidden and more):  # dots in both operands broadcast
            return None
        named = tuple(f"...{index}" for index in range(more))
        hidden = hidden or named
        read_terms.append((*before, *named, *behind))
    before, _, behind = out.partition("...")
    out_labels = (*before, *hidden, *behind) if "..." in out else tuple(out)
    if any(len(set(labels)) < len(labels) for labels in (*read_terms, out_labels)):
        return None
    return operands, read_terms, out_labels

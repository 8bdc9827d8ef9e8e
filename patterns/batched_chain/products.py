"""How batched products are written: as products of matrices, by ``einsum``, or as sums of elementwise ones."""

from __future__ import annotations

import string
from collections.abc import Iterator

import sympy
from torch import fx

from structfly.patterns.batched_chain.axes import sizes_of
from structfly.patterns.batched_chain.product import ONE, Product
from structfly.patterns.batched_chain.stacked import read_stacked
from structfly.rewriter.calls import Call, flat, read
from structfly.rewriter.region import example
from structfly.rewriter.writes import written


def read_products(node: fx.Node) -> Iterator[Product]:
    """Both readings of a batched product, by which operand is the factor; none of what has no batch."""
    call = read(node)
    if call is None or written(node) or example(node) is None:
        return
    if call.op == "stack":
        stacked = read_stacked(call)
        if stacked is not None:
            yield stacked
        return
    reader = _READERS.get(call.op)
    labelled = None if reader is None else reader(call)
    if labelled is None:
        return
    operands, terms, out = labelled
    for data, factor in ((0, 1), (1, 0)):
        batches = set(terms[data]) & set(terms[factor]) & set(out)
        contracted = (set(terms[data]) & set(terms[factor])) - set(out)
        every = {label for label in (*terms[data], *terms[factor]) if not label.startswith(ONE)}
        if batches and contracted and set(out) | contracted == every:
            inner = (call["input"],) if call.op == "sum" else ()
            yield Product(node, operands[data], operands[factor], terms[data], terms[factor], out, inner)


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


def _sum(call: Call) -> _Labelled | None:
    """The sum of elementwise products over some dimensions, which is a product of matrices."""
    product, dims = read(call["input"]), call.get("dim")
    if product is None or product.op != "mul" or written(product.node):
        return None
    operands = [product["input"], product["other"]]
    values, total, result = [example(operand) for operand in operands], example(product.node), example(call.node)
    if values[0] is None or values[1] is None or total is None or result is None or dims is None:
        return None
    dtypes = {values[0].dtype, values[1].dtype, result.dtype}
    if call.get("keepdim") or "dtype" in call.arguments or len(dtypes) > 1:
        return None
    summed = {int(dim) % total.ndim for dim in flat(dims)}
    sizes = [(sympy.Integer(1),) * (total.ndim - value.ndim) + sizes_of(value) for value in values if value is not None]
    terms = []
    for own, other, value in zip(sizes, reversed(sizes), values, strict=True):
        assert value is not None
        labels = [
            f"{ONE}{place}" if size == 1 and beside != 1 else str(place)
            for place, (size, beside) in enumerate(zip(own, other, strict=True))
        ]
        terms.append(tuple(labels[total.ndim - value.ndim :]))
    return operands, terms, tuple(str(place) for place in range(total.ndim) if place not in summed)


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


_READERS = {"matmul": _matmul, "bmm": _matmul, "einsum": _einsum, "sum": _sum}

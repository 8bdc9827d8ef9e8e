"""Batched products, each read both ways."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from structfly.patterns.batched_chain.product import Product
from structfly.patterns.batched_chain.stacked import read_stacked
from structfly.rewriter.calls import read
from structfly.rewriter.labelled import ONE, read_labelled
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
    labelled = read_labelled(call)
    if labelled is None:
        return
    operands, terms, out = labelled.operands, labelled.terms, labelled.out
    for data, factor in ((0, 1), (1, 0)):
        batches = set(terms[data]) & set(terms[factor]) & set(out)
        contracted = (set(terms[data]) & set(terms[factor])) - set(out)
        every = {label for label in (*terms[data], *terms[factor]) if not label.startswith(ONE)}
        if batches and contracted and set(out) | contracted == every:
            yield Product(node, operands[data], operands[factor], terms[data], terms[factor], out, labelled.nodes[1:])

"""Recurrences as a product with the matrix of all their gates' products.

    h_t = sum over s <= t of W_ts b_s,    W_ts = f_{s + 1} ... f_t

of which the matrix, as large as the square of the steps, is written as

    W = exp(S),  S_ts = A_t - A_s for s <= t and -inf for others,  A = cumsum(l),  f = exp(l)
    W = exp(S),  S = cumsum over t of l_t for s < t and 0 for others; -inf for s > t
    W_ts = F_t / F_s for s <= t and 0 for others,  F = cumprod(f)

The second is the segment sum of Dao and Gu (2024, listing 1), made so because the others are no numbers from the first
gate of 0 on: it alone is the same function as the recurrence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import sympy
from torch import fx

from structfly.compat import expression
from structfly.patterns.linear_recurrence.expressions import Expression, Operation
from structfly.patterns.linear_recurrence.menu import multiplied
from structfly.patterns.linear_recurrence.step_matrices import StepMatrix, read_step_matrix, repeated
from structfly.patterns.linear_recurrence.whole import Source, WholeSite, whole_site
from structfly.records import Miss
from structfly.rewriter.calls import read
from structfly.rewriter.labelled import ONE, Labelled, read_labelled
from structfly.rewriter.region import Region, example_of, qualified_name
from structfly.rewriter.writes import written


def read_segment_sums(region: Region, rule: str, *, exact: bool) -> Iterator[WholeSite | Miss]:
    """The states that are made by such products, or why they are not those of the recurrence.

    Args:
        region: where they are.
        rule: which finds them.
        exact: those that are the same function, or the others.
    """
    for call in region.calls:
        product = read_labelled(call)
        if product is None:
            continue
        for place in range(2):
            weights, labels, views = _without_ones(product.operands[place], product.terms[place])
            matrix = read_step_matrix(weights, region)
            if matrix is not None and matrix.exact == exact:
                matrix = matrix._replace(nodes=(*views, *matrix.nodes))
                yield _site(product, 1 - place, weights, labels, matrix, region, rule)
                break


def _without_ones(node: fx.Node, labels: tuple[str, ...]) -> tuple[fx.Node, list[str], list[fx.Node]]:
    """What an operand is broadcast of, with its labels; and the views."""
    own, views = list(labels), list[fx.Node]()
    while True:
        call, view = read(node), repeated(node)
        if view is not None and example_of(node).shape[view.dim] == 1:
            own.pop(view.dim)
            node, views = view.source, [*views, *view.nodes]
        elif call is not None and call.op == "expand" and example_of(call["input"]).ndim == len(own):
            node, views = call["input"], [*views, node]
        else:
            return node, own, views


def _site(
    product: Labelled,
    other: int,
    weights: fx.Node,
    labels: list[str],
    matrix: StepMatrix,
    region: Region,
    rule: str,
) -> WholeSite | Miss:
    node, inputs, of_inputs = product.nodes[0], product.operands[other], product.terms[other]
    row, column = labels[matrix.row], labels[matrix.column]
    nodes = frozenset((*product.nodes, *matrix.nodes))

    def miss(at: fx.Node, reason: str) -> Miss:
        return Miss(rule, at, reason, 1, node, qualified_name(node))

    known = {label for label in (*labels, *of_inputs) if not label.startswith(ONE)}
    if row in of_inputs or column not in of_inputs or column in product.out or set(product.out) != known - {column}:
        return miss(node, "the matrix of the gates' products is not multiplied by inputs and summed over their steps")
    for each in matrix.nodes:
        if written(each):
            return miss(each, f"{each.name} writes into what it is made of; use what returns a new tensor")
    sizes = example_of(weights).shape
    steps = sizes[matrix.row]
    if not isinstance(steps, int):
        return miss(weights, f"there are {steps} steps; taken is a number of them that the graph is compiled for")
    if reason := matrix.why_none(steps, region):
        return miss(weights, reason)
    states = [label for label in product.out if label != row]
    of_gates = [label for at, label in enumerate(labels) if at not in (matrix.row, matrix.column)]
    arranged = _arranged(of_gates, states)
    gate = matrix.gate._replace(made=lambda value: matrix.gate.made(arranged(value)))
    beside = [label for label in of_inputs if label != column]
    input = Source(inputs, _arranged(beside, states), of_inputs.index(column))
    kept = partial(multiplied, weights=sympy.prod([expression(size) for size in sizes]))
    return whole_site(node, gate, input, product.out.index(row), nodes, kept, region, rule)


def _arranged(labels: list[str], wanted: list[str]) -> Callable[[Expression], Expression]:
    """What makes of a step's value with so labelled dimensions one whose dimensions are those ``wanted``, of size 1
    where it has none."""
    own = [label for label in labels if not label.startswith(ONE)]
    order = tuple(own.index(label) for label in wanted if label in own)

    def arrange(value: Expression) -> Expression:
        for dim in reversed([dim for dim, label in enumerate(labels) if label not in own]):
            value = Operation("squeeze", (("input", value), ("dim", dim)))
        if order != tuple(range(len(own))):
            value = Operation("permute", (("input", value), ("dims", order)))
        for dim, label in enumerate(wanted):
            if label not in own:
                value = Operation("unsqueeze", (("input", value), ("dim", dim)))
        return value

    return arrange

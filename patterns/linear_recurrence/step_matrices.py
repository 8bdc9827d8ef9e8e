"""The matrix of what each step's input is multiplied by in each later state: the products of the gates between them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from torch import fx

from structfly.compat import expression
from structfly.patterns.linear_recurrence.gates import cumulated, exponential_of
from structfly.patterns.linear_recurrence.masks import Mask, Masked, masked, why_no_triangle
from structfly.patterns.linear_recurrence.whole import Source
from structfly.rewriter.calls import Call, index_entries, read
from structfly.rewriter.region import Region, example, example_of


class StepMatrix(NamedTuple):
    """W_ts = f_{s + 1} ... f_t for s <= t, and 0 for others.

    Attributes:
        gate: what gates are made of: its dimensions are those of W without ``column``.
        row, column: the dimensions of t and of s.
        masks: each with the highest diagonal that it has to keep.
        nodes: what makes W of the gates.
        exact: whether it is W where gates are 0, too.
    """

    gate: Source
    row: int
    column: int
    masks: tuple[tuple[Mask, int], ...]
    nodes: tuple[fx.Node, ...]
    exact: bool

    def why_none(self, steps: int, region: Region) -> str:
        """Why its masks do not make it W, or ""."""
        rank = example_of(self.gate.tensor).ndim + 1
        reasons = (
            why_no_triangle(mask, rank, (self.row, self.column), steps, diagonal, region)
            for mask, diagonal in self.masks
        )
        return next(filter(None, reasons), "")


def read_step_matrix(node: fx.Node, region: Region) -> StepMatrix | None:
    """The matrix that a node is, if its masks are as they should be; None for what is none in any case."""
    for found, inner, around in _unmasked(node, region):
        if found is not None and around:
            masks = (*found.masks, *((each.mask, 0) for each in around))
            if example_of(node).ndim != example_of(found.gate.tensor).ndim + 1:
                return None
            nodes = dict.fromkeys((node, *(each.node for each in around), *inner, *found.nodes))
            return found._replace(masks=masks, nodes=tuple(nodes))
    return None


def _unmasked(
    node: fx.Node, region: Region
) -> Iterator[tuple[StepMatrix | None, tuple[fx.Node, ...], tuple[Masked, ...]]]:
    """What a node may be without masks, what makes it of that, and the masks."""
    for product, outside in _with_masks(node, 0.0, region):
        call = read(product)
        if call is not None and call.op == "exp":
            for sums, inside in _with_masks(call["input"], -math.inf, region):
                yield _differences(sums) or _segment_sums(sums, region), (product,), (*outside, *inside)
        elif call is not None and call.op == "div" and call.get("rounding_mode") is None:
            yield _quotients(call), (), outside


def _with_masks(node: fx.Node, fill: float, region: Region) -> Iterator[tuple[fx.Node, tuple[Masked, ...]]]:
    yield node, ()
    yield from ((each.value, (each,)) for each in masked(node, fill, region))


def _differences(node: fx.Node) -> StepMatrix | None:
    """A_t - A_s."""
    call = read(node)
    if call is None or call.op != "sub" or call.get("alpha", 1) != 1:
        return None
    return _of_both(call, "cumsum")


def _quotients(call: Call) -> StepMatrix | None:
    """F_t / F_s."""
    return _of_both(call, "cumprod")


def _of_both(call: Call, op: str) -> StepMatrix | None:
    """What is made of a cumulative sum, or product, at t and at s."""
    at_row, at_column = repeated(call["input"]), repeated(call["other"])
    if at_row is None or at_column is None or at_row.source is not at_column.source:
        return None
    made = cumulated(at_row.source, op)
    row, column = at_column.dim, at_row.dim
    if made is None or (made.dim + (column <= made.dim), made.dim + (row <= made.dim)) != (row, column):
        return None
    gate = exponential_of(made.source) if op == "cumsum" else Source(made.source)
    nodes = (call.node, *at_row.nodes, *at_column.nodes, made.node)
    return StepMatrix(gate._replace(dim=made.dim), row, column, (), nodes, exact=False)


def _segment_sums(node: fx.Node, region: Region) -> StepMatrix | None:
    """The cumulative sum over t of what is l_t for s < t."""
    made = cumulated(node, "cumsum")
    if made is None:
        return None
    for each in masked(made.source, 0.0, region, products=False):
        found = repeated(each.value)
        if found is not None and found.dim != made.dim and example_of(found.nodes[0]).ndim == example_of(node).ndim:
            row, column = made.dim, found.dim
            gate = exponential_of(found.source)._replace(dim=row - (row > column))
            nodes = (node, each.node, *found.nodes)
            return StepMatrix(gate, row, column, ((each.mask, -1),), nodes, exact=True)
    return None


class Repeated(NamedTuple):
    """A tensor that is the same along ``dim``, which ``source`` does not have."""

    source: fx.Node
    dim: int
    nodes: tuple[fx.Node, ...]


def repeated(node: object) -> Repeated | None:
    """What a node has along a dimension that is new, again and again."""
    call, nodes = read(node), list[fx.Node]()
    while call is not None and call.op in ("expand", "expand_as", "repeat"):
        nodes.append(call.node)
        call = read(call["input"])
    dim = None if call is None else _inserted(call)
    if call is None or dim is None:
        return None
    for each in nodes:
        sizes, before = (list(map(expression, example_of(tensor).shape)) for tensor in (each, call.node))
        if len(sizes) != len(before) or any(size != sizes[at] for at, size in enumerate(before) if at != dim):
            return None
    return Repeated(call["input"], dim, (*nodes, call.node))


def _inserted(call: Call) -> int | None:
    """Which dimension a view has more than what it is of, if it differs in nothing else."""
    if call.op not in ("unsqueeze", "getitem"):
        return None
    tensor = example(call["input"])
    if tensor is None:
        return None
    if call.op == "unsqueeze":
        return int(call["dim"]) % (tensor.ndim + 1)
    entries = index_entries(call["index"], tensor.ndim)
    new = [at for at, entry in enumerate(entries) if entry is None]
    whole = all(entry is None or entry == slice(None) for entry in entries)
    return new[0] if whole and len(new) == 1 else None

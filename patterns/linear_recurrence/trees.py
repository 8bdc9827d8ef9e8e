"""Scans that are written out with whole tensors, as trees of products and sums of their parts.

Doubling (Hillis and Steele 1986), out of place or in place, in as many rounds as the length has binary digits,

    z = z + f * shift(z, k),    f = f * shift(f, k),    k = 1, 2, 4, ...

and the tree that ``associative_scan`` with ``combine_mode="generic"`` becomes (Blelloch 1990), under a vmap for each
level.  Where at last every place holds the state of all steps up to its own, that is the recurrence.  With fewer rounds
than reach back to the first step a state has a window, which is another function.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from structfly.patterns.linear_recurrence import spans as algebra
from structfly.patterns.linear_recurrence.menu import doubled
from structfly.patterns.linear_recurrence.recurrence import Recurrence
from structfly.patterns.linear_recurrence.tree_reader import TreeReader
from structfly.patterns.linear_recurrence.unread_trees import unread_trees
from structfly.patterns.linear_recurrence.whole import Source, WholeSite, whole_site
from structfly.records import Miss, Stage
from structfly.rewriter.region import Region, qualified_name
from structfly.rewriter.writes import written


def read_trees(region: Region, rule: str) -> Iterator[WholeSite | Miss]:
    """The states that are made by such trees, or why they are not those of the recurrence."""
    reader = TreeReader(region)
    for node in _states(reader):
        yield _site(node, reader, rule)
    yield from unread_trees(reader, rule)


def _states(reader: TreeReader) -> list[fx.Node]:
    """Nodes that hold states of all steps, or of a window of four or more, and of which no others are made."""
    contents = reader.contents
    found = [
        node
        for node, spans in contents.spans.items()
        if contents.is_whole(spans, contents.dims[node]) and (algebra.is_complete(spans) or algebra.reach(spans) >= 4)
    ]
    continued = set[fx.Node]().union(*(_made_by(node, reader) - {node} for node in found))
    return [node for node in found if node not in continued]


def _site(node: fx.Node, reader: TreeReader, rule: str) -> WholeSite | Miss:
    region, spans = reader.region, reader.contents.spans[node]
    assert spans.gate is not None
    assert spans.input is not None

    def miss(reason: str) -> Miss:
        return Miss(rule, node, reason, 1, node, qualified_name(node))

    steps, reach = algebra.length(spans.pieces), algebra.reach(spans)
    if reach < steps:
        return miss(
            f"doubling in {reach.bit_length() - 1} rounds reaches back {reach} of {steps} steps: a state has a window, "
            "and is no recurrence; go on until the reach is the length"
        )
    nodes = _nodes_of(node, reader)
    writes = [each for each in nodes if written(each)]
    last = max(writes, key=region.order.__getitem__, default=None)
    if last is not None:
        for each in nodes:
            for user in each.users:
                if user not in nodes and (each is not node or region.order[user] < region.order[last]):
                    return miss(
                        f"{user.name} uses {each.name}, which the doubling writes into; use a copy, or its result"
                    )

    def kept(recurrence: Recurrence, steps: int) -> tuple[Stage, ...]:
        return doubled(recurrence, steps, (steps - 1).bit_length())

    gate, input = Source(spans.gate), Source(spans.input)
    dim = reader.contents.dims[node]
    return whole_site(node, gate, input, dim, frozenset(nodes), kept, region, rule, last)


def _made_by(node: fx.Node, reader: TreeReader) -> set[fx.Node]:
    """What the states ``node`` are made by, of gates and inputs; with them."""
    spans, writes = reader.contents.spans[node], reader.contents.writes
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        each = pending.pop()
        if each not in found and each not in (spans.gate, spans.input) and reader.has_read(each):
            found.add(each)
            pending += [*each.all_input_nodes, *writes.get(each, ())]
    return found


def _nodes_of(node: fx.Node, reader: TreeReader) -> set[fx.Node]:
    """What ``node`` is made by, and what is made of that and used by nobody."""
    spans, found = reader.contents.spans[node], _made_by(node, reader)
    below = {*found, spans.gate, spans.input}
    for each in reader.region.graph.nodes:
        if reader.has_read(each) and not below.isdisjoint(each.all_input_nodes):
            below.add(each)
    for each in reversed(reader.region.graph.nodes):
        if each in below and found.issuperset(each.users):
            found.add(each)
    return found.difference((spans.gate, spans.input))

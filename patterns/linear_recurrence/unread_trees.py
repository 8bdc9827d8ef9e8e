"""Trees of ``associative_scan`` with ``combine_mode="generic"`` whose function is another than that of a recurrence.

Such a tree is known by what it does whatever the function: under a vmap the places 0, 2, 4, ... of its leaves are
combined with the places 1, 3, 5, ..., and what comes of it is interleaved at last.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from structfly import compat
from structfly.patterns.linear_recurrence.operations import name_of
from structfly.patterns.linear_recurrence.tree_reader import TreeReader
from structfly.records import Miss
from structfly.rewriter.calls import read
from structfly.rewriter.region import qualified_name
from structfly.rewriter.writes import unused

_ARRANGEMENTS = ("slice", "cat", "pad", "stack", "flatten")


def unread_trees(reader: TreeReader, rule: str) -> Iterator[Miss]:
    """A miss for each of their results that is used."""
    made = _made_of_unread(reader)
    inner: set[fx.Node] = set()
    unseen = unused(reader.region)
    for node in reversed(made):
        is_result = _is_interleaved(node) and node not in inner
        if is_result or node in inner:
            inner.update(node.all_input_nodes)
        if is_result and node not in unseen:
            cause = made[node]
            reason = (
                f"the tree of an associative_scan, in which {cause.name} ({name_of(cause)}) is no part of a a' or of "
                "a' b + b', for gates a and inputs b; with combine_mode=\"pointwise\" more functions are read"
            )
            yield Miss(rule, node, reason, 1, node, qualified_name(node))


def _made_of_unread(reader: TreeReader) -> dict[fx.Node, fx.Node]:
    """What is arranged of the results of functions that are not read, and the operation that is to blame."""
    made: dict[fx.Node, fx.Node] = {}
    for node in reader.region.graph.nodes:
        mapped = compat.batched(node)
        if mapped is not None:
            source, _, opens = mapped
            cause = None if opens else _cause(source, reader)
            if cause is not None:
                made[node] = cause
            continue
        call = read(node)
        causes = [made[each] for each in node.all_input_nodes if each in made]
        if causes and call is not None and call.op in _ARRANGEMENTS:
            made[node] = causes[0]
    return made


def _cause(result: fx.Node, reader: TreeReader) -> fx.Node | None:
    """The first operation of a vmap that is not read, if what is mapped are neighbours."""
    starts: set[int] = set()
    unread: list[fx.Node] = []
    seen: set[fx.Node] = set()
    pending = [result]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        view = reader.contents.views.get(node)
        if compat.batched(node) is None:
            pending += node.all_input_nodes
            if not reader.has_read(node) or (node is result and not reader.contents.is_known(node)):
                unread.append(node)
        elif view is not None and view.taken.step == 2:
            starts.add(view.taken.start)
    return min(unread, key=reader.region.order.__getitem__) if unread and starts == {0, 1} else None


def _is_interleaved(node: fx.Node) -> bool:
    call = read(node)
    stack = read(call["input"]) if call is not None and call.op == "flatten" else None
    return stack is not None and stack.op == "stack" and len(stack["tensors"]) == 2

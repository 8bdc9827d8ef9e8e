"""Writes into tensors: which nodes make them, and whether a group of nodes may be computed later than it stands.

A rewrite computes at its last node what eager computed at several earlier ones.  A write in between, into anything that
those nodes read, would be seen by the one and not by the other.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Collection, Iterator
from functools import cache
from types import FunctionType
from typing import Any

from torch import fx

from structfly import compat
from structfly.rewriter.calls import read
from structfly.rewriter.region import Region, bodies, example, example_tensors
from structfly.rewriter.views import VIEWS

_INPLACE_OPERATORS = {
    operator.setitem,
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.itruediv,
    operator.ifloordiv,
    operator.imod,
    operator.ipow,
    operator.iand,
    operator.ior,
    operator.ixor,
    operator.ilshift,
    operator.irshift,
}


def written(node: fx.Node) -> list[fx.Node]:
    """The arguments of ``node`` that it writes into, as far as its name, its keywords and its schema tell."""
    if node.op == "call_method":
        return _nodes(node.args[:1]) if _names_a_write(str(node.target)) else []
    if node.op != "call_function":
        return []
    if node.target in _INPLACE_OPERATORS or _is_told_to_write(node):
        return _nodes(node.args[:1]) or _nodes(node.kwargs.get("input"))
    declared = compat.written_arguments(node)
    if declared is not None:
        return _nodes(declared)
    named = node.args[:1] if _is_named_a_write(node.target) else ()
    return _nodes((named, node.kwargs.get("out")))


def _is_told_to_write(node: fx.Node) -> bool:
    """Whether ``inplace=True`` is among the arguments, by name or by position."""
    if "inplace" in node.kwargs:
        return node.kwargs["inplace"] is True
    place = _place_of_inplace(node.target) if isinstance(node.target, FunctionType) else None
    return place is not None and place < len(node.args) and node.args[place] is True


@cache
def _place_of_inplace(function: FunctionType) -> int | None:
    parameters = list(inspect.signature(function).parameters)
    return parameters.index("inplace") if "inplace" in parameters else None


def _is_named_a_write(function: Any) -> bool:
    """By its name; ``operator.or_`` and its like end in what tells them from keywords."""
    of_python = getattr(function, "__module__", "") == "_operator"
    return not of_python and _names_a_write(getattr(function, "__name__", ""))


def _names_a_write(name: str) -> bool:
    """``add_`` and ``__iadd__``, as torch names what works in place."""
    dunder = name.startswith("__") and name.endswith("__")
    return name in _INPLACE_METHODS if dunder else name.endswith("_")


_INPLACE_METHODS = {f"__{function.__name__}__" for function in _INPLACE_OPERATORS}


def _nodes(values: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(values, found.append)
    return found


def unused(region: Region) -> set[fx.Node]:
    """The nodes that only read and whose values nothing uses, but for nodes of which the same holds: what a model
    returns, say, and the compiled function does not."""
    found: set[fx.Node] = set()
    for call in reversed(region.calls):
        if found.issuperset(call.node.users) and not written(call.node):
            found.add(call.node)
    return found


def why_pinned(region: Region, nodes: Collection[fx.Node]) -> tuple[fx.Node, str] | None:
    """Why ``nodes`` cannot all be computed where the last of them stands, and the node to blame; None if they can.

    Tensors are told apart by their storage, so that a write through a view counts.  A tensor whose version tells of
    more writes than can be found in the graph pins what reads it.
    """
    order = region.order
    first, last = min(map(order.__getitem__, nodes)), max(map(order.__getitem__, nodes))
    members = set(nodes)
    read = {operand for node in nodes for operand in node.all_input_nodes} - members
    storages = {key for operand in read for key in _storages(operand)}
    # What the site makes and reads, and where it reads it last.
    used: dict[int, int] = {}
    for node in nodes:
        for operand in members.intersection(node.all_input_nodes):
            for key in _storages(operand):
                used[key] = max(used.get(key, 0), order[node])
    found: dict[int, int] = {}
    for place, node, target in writes_in(region):
        for key in _storages(target):
            found[key] = found.get(key, 0) + 1
        if not first <= place <= last:
            continue
        if node in members:
            if target not in members:
                return node, f"{node.name} writes into {target.name}, which stays in the graph"
        elif storages.intersection(_storages(target)):
            return node, (
                f"{node.name} writes into a tensor that the nodes of this site read, after the first of them and "
                "before the last; write into a copy, or later"
            )
        elif any(used.get(key, -1) > place for key in _storages(target)):
            return node, f"{node.name} writes into {target.name}, which this site makes and uses; write into a copy"
    # An input that shares memory with another one is made with a version of 1.
    inputs = {key for node in region.graph.nodes if node.op == "placeholder" for key in _storages(node)}
    for operand in sorted(read, key=order.__getitem__):
        tensor = example(operand)
        known = sum(found.get(key, 0) + (key in inputs) for key in _storages(operand))
        if tensor is not None and compat.version(tensor) > known:
            return operand, f"{operand.name} is written in place by an operation whose place is not known"
    return None


def overwritten(region: Region, nodes: Collection[fx.Node]) -> tuple[fx.Node, str] | None:
    """A node that writes into the value of one of ``nodes``, and that as a reason; None if there is none."""
    owners = {key: node for node in nodes for key in _storages(node)}
    for _, writer, target in writes_in(region):
        for key in _storages(target):
            if key in owners:
                name = owners[key].name
                return writer, f"{writer.name} writes into {name}, which the loss is made of; write into a copy"
    return None


def why_late(
    region: Region, node: fx.Node, place: fx.Node, unavailable: Collection[fx.Node], moved: set[fx.Node]
) -> fx.Node | None:
    """The node that keeps ``node`` from being computed before ``place``, or None; ``moved`` takes what has to move.

    What stands before ``place`` is there, but for ``unavailable`` nodes.  What stands later can move if it is known to
    compute a value and nothing else, and computes the same under the modes of ``place``.
    """
    if node in unavailable:
        return node
    if region.order[node] < region.order[place] or node in moved:
        return None
    call = read(node)
    if call is None or written(node) or (call.op not in VIEWS and region.modes[node] != region.modes[place]):
        return node
    for operand in node.all_input_nodes:
        late = why_late(region, operand, place, unavailable, moved)
        if late is not None:
            return late
    moved.add(node)
    return None


def writes_in(region: Region) -> Iterator[tuple[int, fx.Node, fx.Node]]:
    """Every write: its place in the graph, its node there, and what is written, perhaps inside a body of that node."""
    for place, node in enumerate(region.graph.nodes):
        for target in written(node):
            yield place, node, target
        for body in bodies(region.owner, node):
            for _, _, target in writes_in(Region(body)):
                yield place, node, target


def _storages(node: fx.Node) -> list[int]:
    return [compat.storage_key(tensor) for tensor in example_tensors(node)]

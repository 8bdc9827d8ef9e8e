"""Values that all steps of a loop share, though each step may make its own."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import fx

from structfly import compat
from structfly.rewriter.calls import read
from structfly.rewriter.region import Region, example_tensors
from structfly.rewriter.writes import writes_in, written


class Values:
    """Which nodes have the same value, whatever it is.

    They are those that the same known operation makes of the same values: known operations draw no random numbers.
    What is written in place has the same value as itself alone.
    """

    def __init__(self, region: Region) -> None:
        self._first: dict[Hashable, fx.Node] = {}
        self._same: dict[fx.Node, fx.Node] = {}
        changed = {
            compat.storage_key(tensor) for _, _, target in writes_in(region) for tensor in example_tensors(target)
        }
        for node in region.graph.nodes:
            content = node if changed and self._touches(node, changed) else self._identity(node)
            self._same[node] = self._first.setdefault(content, node)

    def first(self, node: fx.Node) -> fx.Node:
        """The first node that has the value of ``node``."""
        return self._same[node]

    def _touches(self, node: fx.Node, changed: set[int]) -> bool:
        tensors = (tensor for each in (node, *node.all_input_nodes) for tensor in example_tensors(each))
        return any(compat.storage_key(tensor) in changed for tensor in tensors)

    def _identity(self, node: fx.Node) -> Hashable:
        if node.op == "get_attr":
            return ("get_attr", node.target)
        if read(node) is None or written(node):
            return node
        return (node.target, self._content(node.args), self._content(tuple(node.kwargs.items())))

    def _content(self, value: Any) -> Hashable:
        if isinstance(value, fx.Node):
            return self._same[value]
        if isinstance(value, (tuple, list)):
            return tuple(map(self._content, value))
        if isinstance(value, slice):
            return ("slice", *map(self._content, (value.start, value.stop, value.step)))
        return repr(value)

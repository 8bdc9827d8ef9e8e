"""Writing into a graph so that a failure leaves no trace.

New nodes go in first; replacements and erasures wait for :meth:`Editor.commit`, which checks the graph before it
erases.  :meth:`Editor.rollback` gives the old nodes their users back and takes the new ones out again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx

from structfly import compat
from structfly.rewriter.inputs import ExtraInput, stand_in


class Editor:
    """Edits one graph for one site."""

    def __init__(self, graph: fx.Graph, anchor: fx.Node, *, allow_inputs: bool = True) -> None:
        self._graph = graph
        self._anchor = anchor
        self._allow_inputs = allow_inputs
        self._made: list[fx.Node] = []
        self._replaced: list[tuple[fx.Node, fx.Node]] = []
        self._dead: list[fx.Node] = []
        self._moved_users: list[tuple[fx.Node, fx.Node, list[fx.Node]]] = []
        self.inputs: list[ExtraInput] = []
        self._mode = compat.fake_mode_of(node.meta.get("example_value") for node in graph.nodes)

    def before(self, *nodes: fx.Node) -> None:
        """Put what follows before the last of ``nodes``."""
        places = {node: index for index, node in enumerate(self._graph.nodes)} if len(nodes) > 1 else {}
        self._anchor = max(nodes, key=lambda node: places.get(node, 0))

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A new call_function node, with an example value."""
        return self._create("call_function", target, args, kwargs)

    def method(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        """A new call_method node, with an example value."""
        return self._create("call_method", name, args, kwargs)

    def like(self, node: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node that does to ``args`` what ``node`` does to its own."""
        return self._create(node.op, node.target, args, kwargs)

    def getitem(self, node: fx.Node, index: int) -> fx.Node:
        """Element ``index`` of a tuple-valued node."""
        return self.call(operator.getitem, node, index)

    def size(self, node: fx.Node, dim: int) -> int | fx.Node:
        """The size of a dimension: an int where it is static, else a node."""
        size = node.meta["example_value"].shape[dim]
        return size if isinstance(size, int) else self.method("size", node, dim)

    def add_input(self, name: str, example_value: Tensor, provide: Callable[[], Tensor]) -> fx.Node:
        """A new graph input after the existing ones.

        Raises:
            ValueError: the graph is a body inside another, whose inputs its caller fixes.
        """
        if not self._allow_inputs:
            raise ValueError("a rewrite inside a checkpoint or subgraph body cannot add graph inputs")
        with self._graph.inserting_before(self._anchor):
            node = self._graph.create_node("call_function", stand_in, (name,))
        node.meta["example_value"] = example_value
        self._made.append(node)
        self.inputs.append(ExtraInput(node, provide))
        return node

    def hoist(self, node: fx.Node) -> None:
        """Move ``node`` and what it needs to before the point of insertion; for nodes that read and never write."""
        order = {other: index for index, other in enumerate(self._graph.nodes)}
        here = order[self._anchor]
        moving, pending = {node}, [node]
        while pending:
            needed = [other for other in pending.pop().all_input_nodes if order[other] > here and other not in moving]
            moving.update(needed)
            pending.extend(needed)
        for other in sorted(moving, key=order.__getitem__):
            if order[other] > here:
                self._anchor.prepend(other)

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let all users of ``old`` use ``new``, on commit."""
        self._replaced.append((old, new))

    def erase(self, nodes: Sequence[fx.Node]) -> None:
        """Remove those of ``nodes`` that nothing uses any more, on commit."""
        self._dead.extend(nodes)

    def commit(self) -> None:
        """Make the replacements, check the graph, and make the erasures."""
        for old, new in self._replaced:
            self._moved_users.append((old, new, old.replace_all_uses_with(new)))
        self._graph.lint()
        positions = {node: index for index, node in enumerate(self._graph.nodes)}
        for node in sorted({*self._dead, *(old for old, _ in self._replaced)}, key=positions.__getitem__, reverse=True):
            if not node.users:
                self._graph.erase_node(node)

    def rollback(self) -> None:
        """Undo what was done so far; nodes that were hoisted stay where they went."""
        for old, new, users in reversed(self._moved_users):
            for user in users:
                user.replace_input_with(new, old)
        self._moved_users.clear()
        for node in reversed(self._made):
            self._graph.erase_node(node)
        self._made.clear()

    def _create(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        with self._graph.inserting_before(self._anchor):
            node = self._graph.create_node(op, target, args, kwargs)
        self._made.append(node)
        for key in ("stack_trace", "nn_module_stack"):
            if key in self._anchor.meta:
                node.meta[key] = self._anchor.meta[key]
        node.meta["example_value"] = self._example_of(op, target, args, kwargs)
        return node

    def _example_of(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operation on example values, under the graph's fake mode and outside any trace."""
        positional, named = fx.node.map_arg((args, kwargs), lambda node: node.meta["example_value"])
        with compat.example_mode(self._mode):
            if op == "call_method":
                return getattr(positional[0], target)(*positional[1:], **named)
            return target(*positional, **named)

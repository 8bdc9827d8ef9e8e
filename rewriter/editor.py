"""Writing into a graph so that a failure leaves no trace.

New nodes go in first; replacements and erasures wait for :meth:`Editor.commit`, which checks the graph before it
erases.  :meth:`Editor.rollback` gives the old nodes their users back and takes the new ones out again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from structfly import compat
from structfly.rewriter.inputs import ExtraInputs, InputLike, Provide, stand_in


class Editor:
    """Edits one graph for one site."""

    def __init__(
        self,
        graph: fx.Graph,
        anchor: fx.Node,
        *,
        allow_inputs: bool = True,
        successors: dict[fx.Node, fx.Node] | None = None,
    ) -> None:
        """``successors``: the nodes that editors of the same graph replaced before, and by what; added to on commit."""
        self._graph = graph
        self._successors = {} if successors is None else successors
        self._anchor = anchor
        self._allow_inputs = allow_inputs
        self._made: list[fx.Node] = []
        self._replaced: list[tuple[fx.Node, fx.Node, Collection[fx.Node] | None]] = []
        self._dead: list[fx.Node] = []
        self._moved_users: list[tuple[fx.Node, fx.Node, list[fx.Node]]] = []
        self.inputs: list[ExtraInputs] = []
        self._mode = compat.fake_mode_of(node.meta.get("example_value") for node in graph.nodes)

    def before(self, *nodes: fx.Node) -> None:
        """Put what follows before the last of ``nodes``."""
        places = {node: index for index, node in enumerate(self._graph.nodes)} if len(nodes) > 1 else {}
        self._anchor = max(nodes, key=lambda node: places.get(node, 0))

    def before_all(self, *nodes: fx.Node) -> None:
        """Put what follows before the first of ``nodes``."""
        places = {node: index for index, node in enumerate(self._graph.nodes)}
        self._anchor = min(nodes, key=places.__getitem__)

    def after(self, *nodes: fx.Node) -> None:
        """Put what follows behind the last of ``nodes``."""
        self.before(*nodes)
        self._anchor = self._anchor.next

    def current(self, node: fx.Node) -> fx.Node:
        """What has the value of ``node`` now, if a rewrite before this one replaced it."""
        while node in self._successors:
            node = self._successors[node]
        return node

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

    def trace(self, function: Callable[..., Tensor], *args: Any) -> fx.Node:
        """What ``function`` does to ``args``, tensors and nested lists or dicts of them given as nodes, as new nodes.

        Its torch calls are noted while it runs on example values, so that it may ask for anything but a tensor's data.

        Raises:
            ValueError: it uses a tensor that is neither an argument nor made of those.
        """
        recorder = _Recorder(self)
        with compat.example_mode(self._mode), recorder:
            result = function(*fx.node.map_arg(args, recorder.value))
        node: fx.Node = recorder.node(result)
        return node

    def add_inputs(self, inputs: Mapping[str, InputLike], provide: Provide) -> dict[str, fx.Node]:
        """New graph inputs after the existing ones, by name.

        Args:
            inputs: what each is like, by a name that no other input has.
            provide: gives their values, in order; see :class:`~structfly.rewriter.inputs.ExtraInputs`.

        Raises:
            ValueError: the graph is a body inside another, whose inputs its caller fixes.
        """
        if not self._allow_inputs:
            raise ValueError("a rewrite inside a checkpoint or subgraph body cannot add graph inputs")
        nodes = {name: self._insert("call_function", stand_in, (name,), {}) for name in inputs}
        with compat.example_mode(self._mode):
            for name, like in inputs.items():
                nodes[name].meta["example_value"] = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        self.inputs.append(ExtraInputs(tuple(nodes.values()), provide))
        return nodes

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

    def replace(self, old: fx.Node, new: fx.Node, users: Collection[fx.Node] | None = None) -> None:
        """Let all users of ``old``, or those named, use ``new``, on commit."""
        self._replaced.append((old, new, users))

    def erase(self, nodes: Sequence[fx.Node]) -> None:
        """Remove those of ``nodes`` that are there and that nothing uses any more, on commit."""
        self._dead.extend(nodes)

    def commit(self) -> None:
        """Make the replacements, check the graph, and make the erasures."""
        for old, new, named in self._replaced:
            users = old.replace_all_uses_with(new, None if named is None else frozenset(named).__contains__)
            self._moved_users.append((old, new, users))
        self._graph.lint()
        self._successors.update((old, new) for old, new, _ in self._replaced)
        superfluous = {*self._dead, *(old for old, _, _ in self._replaced)}
        for node in reversed([each for each in self._graph.nodes if each in superfluous]):
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
        node = self._insert(op, target, args, kwargs)
        node.meta["example_value"] = self._example_of(op, target, args, kwargs)
        return node

    def _insert(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        with self._graph.inserting_before(self._anchor):
            node = self._graph.create_node(op, target, args, kwargs)
        self._made.append(node)
        for key in ("stack_trace", "nn_module_stack"):
            if key in self._anchor.meta:
                node.meta[key] = self._anchor.meta[key]
        return node

    def _example_of(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operation on example values, under the graph's fake mode and outside any trace."""
        positional, named = fx.node.map_arg((args, kwargs), lambda node: node.meta["example_value"])
        with compat.example_mode(self._mode):
            if op == "call_method":
                return getattr(positional[0], target)(*positional[1:], **named)
            return target(*positional, **named)


class _Recorder(TorchFunctionMode):
    """Writes the torch calls that are made while it is at work as nodes; ``nodes`` are those of tensors, by id."""

    def __init__(self, editor: Editor) -> None:
        super().__init__()
        self.editor = editor
        self.nodes: dict[int, fx.Node] = {}

    def value(self, node: fx.Node) -> Any:
        """The example value of a node, which stands for it from here on."""
        value = node.meta["example_value"]
        self.nodes[id(value)] = node
        return value

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if _tensors_in(result):
            op, target = ("call_method", func.__name__) if _is_method(func) else ("call_function", func)
            positional, named = fx.node.map_aggregate((args, kwargs or {}), self.node)
            self._note(self.editor._insert(op, target, positional, named), result)
        return result

    def node(self, value: Any) -> Any:
        """The node of a tensor; other values as they are."""
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self.nodes:
            raise ValueError("a traced function uses a tensor that is none of its arguments; pass it")
        return self.nodes[id(value)]

    def _note(self, node: fx.Node, value: Any) -> None:
        node.meta["example_value"] = value
        if isinstance(value, Tensor):
            self.nodes[id(value)] = node
            return
        for index, element in enumerate(value):
            if _tensors_in(element):
                self._note(self.editor._insert("call_function", operator.getitem, (node, index), {}), element)


def _tensors_in(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    fx.node.map_aggregate(value, lambda leaf: found.append(leaf) if isinstance(leaf, Tensor) else None)
    return found


def _is_method(function: Any) -> bool:
    return getattr(Tensor, function.__name__, None) is function

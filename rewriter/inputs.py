"""Graph inputs that rewrites add.

Dynamo keeps the graph it hands over and looks at its inputs again after the backend has returned, so a new input cannot
be a placeholder of that graph.  While rules write, a new input is a stand-in node; afterwards the whole graph is copied
into a module of its own, in which the stand-ins are placeholders behind the existing ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from structfly import compat


@dataclass(frozen=True)
class ExtraInput:
    """A graph input that a rewrite added: ``provide()`` is asked for its value before every call."""

    node: fx.Node
    provide: Callable[[], Tensor]


def stand_in(name: str) -> Tensor:
    """Target of the node that stands for the input ``name`` until the graph has been copied; never run."""
    raise AssertionError(f"the graph input {name} was not made a placeholder")


def with_placeholders(gm: fx.GraphModule, inputs: Sequence[ExtraInput]) -> fx.GraphModule:
    """A copy of ``gm`` that takes ``inputs`` as further arguments, in order."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    for extra in inputs:
        copies[extra.node] = graph.placeholder(str(extra.node.args[0]))
        copies[extra.node].meta.update(extra.node.meta)
    for node in gm.graph.nodes:
        if node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    module = compat.graph_module(gm, graph)
    module.meta.update(gm.meta)
    return module

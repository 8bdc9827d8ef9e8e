"""Graph inputs that rewrites add.

Dynamo keeps the graph it hands over and looks at its inputs again after the backend has returned, so a new input cannot
be a placeholder of that graph.  While rules write, a new input is a stand-in node; afterwards the whole graph is copied
into a module of its own, in which the stand-ins are placeholders behind the existing ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from structfly import compat

Provide = Callable[[Sequence[Any]], Sequence[Tensor]]


class UnfitError(Exception):
    """What a rewrite wrote does not hold for the arguments of a call; the message says why."""


class InputLike(NamedTuple):
    """What a contiguous input is like."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class ExtraInputs:
    """Graph inputs that a rewrite added together.

    Attributes:
        nodes: the inputs.
        provide: asked for their values before every call, given the call's arguments: the graph's own inputs in order.
            Where the site was ``conditional`` it may raise :class:`UnfitError`; the call is then run by the graph as it
            was before any rewrite.
    """

    nodes: tuple[fx.Node, ...]
    provide: Provide


def stand_in(name: str) -> Tensor:
    """Target of the node that stands for the input ``name`` until the graph has been copied; never run."""
    raise AssertionError(f"the graph input {name} was not made a placeholder")


def copy_of(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph as it stands, in a module of its own that takes the same arguments."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    return fx.GraphModule(gm, graph)


def with_placeholders(gm: fx.GraphModule, inputs: Iterable[ExtraInputs]) -> fx.GraphModule:
    """A copy of ``gm`` that takes ``inputs`` as further arguments, in order; each keeps its address from call to call
    where it can, as parameters do."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    added = [node for extra in inputs for node in extra.nodes]
    for node in added:
        copies[node] = graph.placeholder(str(node.args[0]))
        copies[node].meta.update(node.meta)
    for node in gm.graph.nodes:
        if node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    module = compat.graph_module(gm, graph)
    module.meta.update(gm.meta)
    compat.keep_sources(gm, module, [copies[node] for node in added])
    return module

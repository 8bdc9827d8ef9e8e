"""Regions: the graphs inside a compiled graph, and what every rule asks of their nodes.

The main graph and the bodies of checkpoint and invoke_subgraph nodes are open to rewrites.  Bodies of control flow and
of transforms are closed: a rule's finds there become misses that say so.  Those of custom autograd functions are open
to rewrites that make the same values and do nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx

from structfly import compat
from structfly.rewriter.calls import Call, read


@dataclass(frozen=True)
class Region:
    """One graph and its surroundings.

    Attributes:
        owner: the module that owns ``graph``.
        checkpointed: True inside an activation-checkpoint body, whose forward runs twice.
        body: True inside any body, whose inputs its caller fixes.
        closed: why nothing may be rewritten here, or "".
        custom: True inside a body of a custom autograd function: its forward or its backward, neither of which is
            differentiated.
    """

    owner: fx.GraphModule
    checkpointed: bool = False
    body: bool = False
    closed: str = ""
    custom: bool = False

    @property
    def graph(self) -> fx.Graph:
        return self.owner.graph

    @cached_property
    def order(self) -> dict[fx.Node, int]:
        """Position of every node in the graph."""
        return {node: index for index, node in enumerate(self.graph.nodes)}

    @cached_property
    def calls(self) -> tuple[Call, ...]:
        """Every node that can be read, in graph order, as all rules see it before any of them writes."""
        return tuple(call for call in map(read, self.graph.nodes) if call is not None)

    @cached_property
    def _transformed(self) -> frozenset[fx.Node]:
        depth, inside = 0, []
        for node in self.graph.nodes:
            depth += compat.functorch_nesting(node)
            if depth > 0:
                inside.append(node)
        return frozenset(inside)

    @cached_property
    def modes(self) -> dict[fx.Node, tuple[object, ...]]:
        """What a node runs under: the node that switched the recording of gradients off, if one did, and the autocast
        regions around it."""
        modes: dict[fx.Node, tuple[object, ...]] = {}
        off: fx.Node | None = None
        autocasts: list[fx.Node] = []
        for node in self.graph.nodes:
            modes[node] = (off, *autocasts)
            recorded = compat.sets_grad_mode(node)
            if recorded is not None:
                off = None if recorded else off or node
            if compat.autocast_change(node) > 0:
                autocasts.append(node)
            elif compat.autocast_change(node) < 0 and autocasts:
                autocasts.pop()
        return modes

    @cached_property
    def trains(self) -> bool:
        """Whether anything that the graph gives needs a gradient."""
        outputs = self.graph.find_nodes(op="output")
        return any(needs_gradient(value) for output in outputs for value in output.all_input_nodes)

    @cached_property
    def undifferentiated(self) -> frozenset[fx.Node]:
        """The nodes under a no_grad of this graph."""
        return frozenset(node for node, (off, *_) in self.modes.items() if off is not None)

    def last_with_gradients(self, node: fx.Node) -> fx.Node:
        """``node``, or if gradients are not recorded there the node that switched them off: before it they are."""
        off = self.modes[node][0]
        return off if isinstance(off, fx.Node) else node

    def why_closed(self, node: fx.Node, *, values_only: bool = False) -> str:
        """Why ``node`` may not be rewritten, or ""; ``values_only``: as in :class:`~structfly.records.Site`."""
        if node in self._transformed:
            return "inside a torch.func transform, under which structfly's ops are not shown to work"
        return self.closed or (_CUSTOM if self.custom and not values_only else "")


def regions_of(gm: fx.GraphModule) -> list[Region]:
    """The main graph first, then every body inside it, each once."""
    return list(_walk(Region(gm), set()))


_CUSTOM = "inside a custom autograd function, whose own backward would no longer match"


def _walk(region: Region, seen: set[int]) -> Iterator[Region]:
    seen.add(id(region.owner))
    yield region
    for node in region.graph.nodes:
        kind = compat.subgraph_kind(node) or ""
        for body in bodies(region.owner, node):
            if id(body) in seen:
                continue
            closed, custom = region.closed, region.custom or kind == "autograd_function_apply"
            if kind not in ("checkpoint", "plain", "autograd_function_apply"):
                closed = closed or f"inside the body of {kind}, which structfly does not enter"
            yield from _walk(Region(body, region.checkpointed or kind == "checkpoint", True, closed, custom), seen)


def bodies(owner: fx.GraphModule, node: fx.Node) -> Iterator[fx.GraphModule]:
    """The graphs that ``node`` of ``owner``'s graph runs: a checkpoint's, a branch's, a custom autograd function's."""
    if compat.subgraph_kind(node) is None:
        return
    for argument in (*node.args, *node.kwargs.values()):
        if isinstance(argument, fx.Node) and argument.op == "get_attr":
            body = getattr(owner, str(argument.target), None)
            if isinstance(body, fx.GraphModule):
                yield body


# ------------------------------------------------------------------------------------------------------- names


def example(node: object) -> torch.Tensor | None:
    """The example value of a node if it is one tensor, else None."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def example_of(node: object) -> torch.Tensor:
    """The example value of a node that is known to have one."""
    value = example(node)
    assert value is not None, node
    return value


def example_tensors(node: fx.Node) -> list[torch.Tensor]:
    """The tensors in a node's example value: one, or those of a tuple, or none."""
    value = node.meta.get("example_value")
    values = value if isinstance(value, (tuple, list)) else [value]
    return [each for each in values if isinstance(each, torch.Tensor)]


def needs_gradient(node: object) -> bool:
    """Whether a value takes part in differentiation, as far as its example tells."""
    value = example(node)
    return value is not None and value.requires_grad


def qualified_name(node: fx.Node, parameter: fx.Node | None = None) -> str:
    """The module a node belongs to, as ``named_modules`` would call it, without the outermost variable.

    A node made by an ``nn.Linear`` carries that module's name; otherwise the module that owns ``parameter`` counts,
    then the innermost module around the node.
    """
    stack = list(node.meta.get("nn_module_stack", {}).values())
    if stack and isinstance(stack[-1][1], type) and issubclass(stack[-1][1], torch.nn.Linear):
        return _clean(stack[-1][0])
    if parameter is not None and parameter.op == "placeholder":
        source = compat.source_of_input(parameter)
        if source:
            return _clean(source).removesuffix(".weight")
    return _clean(stack[-1][0]) if stack else ""


def _clean(path: str) -> str:
    path = re.sub(r"\._(?:modules|parameters|buffers)\['([^']+)'\]", r".\1", path)
    while path != (spelt := re.sub(r"getattr\(([^()]*), '([^']+)'\)", r"\1.\2", path)):
        path = spelt
    path = path.replace(".__self__", "")
    path = re.sub(r".*__closure__\[\d+\]\.cell_contents", "closure", path)  # how torch 2.11 names a captured module
    root, _, rest = path.partition(".")
    return rest or re.sub(r"^[LG]\['([^']+)'\]$", r"\1", root)


_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in .*\n\s*(?P<code>[^\n]*)')


def source_line(node: fx.Node) -> str:
    """The innermost line of the user's program a node comes from, as "file:line: code", or ""."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    if not frames:
        return ""
    file, line, code = frames[-1]
    return f"{file}:{line}: {code.strip()}"

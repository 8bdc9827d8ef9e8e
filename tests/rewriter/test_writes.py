"""Which nodes write into what, as far as their names, keywords and schemas tell."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from structfly.rewriter.region import Region
from structfly.rewriter.writes import why_late, written


@pytest.mark.parametrize(
    ("op", "target", "arguments", "named", "expected"),
    [
        ("call_method", "add_", ("x", 1), {}, ["x"]),
        ("call_method", "__iadd__", ("x", "y"), {}, ["x"]),
        ("call_method", "__setitem__", ("x", 0, "y"), {}, ["x"]),
        ("call_method", "add", ("x", "y"), {}, []),
        ("call_method", "__add__", ("x", "y"), {}, []),
        ("call_function", operator.iadd, ("x", "y"), {}, ["x"]),
        ("call_function", operator.setitem, ("x", 0, "y"), {}, ["x"]),
        ("call_function", operator.add, ("x", "y"), {}, []),
        ("call_function", operator.or_, ("x", "y"), {}, []),
        ("call_function", torch.relu_, ("x",), {}, ["x"]),
        ("call_function", torch.relu, ("x",), {}, []),
        ("call_function", F.relu, ("x",), {"inplace": True}, ["x"]),
        ("call_function", F.relu, ("x",), {"inplace": False}, []),
        ("call_function", F.relu, ("x", True), {}, ["x"]),
        ("call_function", F.dropout, ("x", 0.5, True, True), {}, ["x"]),
        ("call_function", F.dropout, ("x", 0.5, True), {}, []),
        ("call_function", torch.mul, ("x", 2.0), {"out": "y"}, ["y"]),
        ("call_function", torch._foreach_add_, (["x", "y"], 1.0), {}, ["x", "y"]),
        ("call_function", torch.ops.aten.copy_.default, ("x", "y"), {}, ["x"]),
        ("call_function", torch.ops.aten.mul.out, ("x", 2.0), {"out": "y"}, ["y"]),
        ("call_function", torch.ops.aten.mul.Tensor, ("x", "y"), {}, []),
    ],
)
def test_the_written_arguments(
    op: str, target: Any, arguments: tuple[Any, ...], named: dict[str, Any], expected: list[str]
) -> None:
    graph = fx.Graph()
    inputs = {name: graph.placeholder(name) for name in ("x", "y")}

    def filled(value: Any) -> Any:
        if isinstance(value, list):
            return [filled(each) for each in value]
        return inputs.get(value, value) if isinstance(value, str) else value

    keywords = {name: filled(value) for name, value in named.items()}
    node = graph.create_node(op, target, tuple(map(filled, arguments)), keywords)
    assert [value.name for value in written(node)] == expected


def test_what_stands_too_late() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    early = graph.call_function(torch.exp, (x,))
    place = graph.call_function(torch.neg, (early,))
    late = graph.call_function(torch.add, (y, early))
    later = graph.call_method("view", (late, -1))
    random = graph.call_function(torch.rand_like, (y,))
    of_random = graph.call_function(torch.exp, (random,))
    written_into = graph.call_method("add_", (later, 1))
    graph.output((place, of_random, written_into))
    region = Region(fx.GraphModule({}, graph))
    nodes = {node.name: node for node in region.graph.nodes}

    def why(node: fx.Node, *unavailable: fx.Node) -> tuple[str | None, set[str]]:
        moved: set[fx.Node] = set()
        gone = [nodes[each.name] for each in unavailable]
        found = why_late(region, nodes[node.name], nodes[place.name], gone, moved)
        return None if found is None else found.name, {each.name for each in moved}

    assert why(early) == (None, set())
    assert why(later) == (None, {late.name, later.name})
    assert why(later, early) == (early.name, set())
    assert why(of_random) == (random.name, set())
    assert why(written_into) == (written_into.name, set())

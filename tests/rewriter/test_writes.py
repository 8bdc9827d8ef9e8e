"""Which nodes write into what, as far as their names, keywords and schemas tell."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from structfly.rewriter.writes import written


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

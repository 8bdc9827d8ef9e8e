"""Names and places in the user's program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from structfly.rewriter.region import Region, qualified_name, source_line


def node_in(path: str, kind: type) -> fx.Node:
    node = fx.Graph().create_node("call_function", torch.sin)
    node.meta["nn_module_stack"] = {"0": ("L['self']", torch.nn.Module), "1": (path, kind)}
    return node


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("L['self'].model.lm_head", "model.lm_head"),
        ("G['model'].head", "head"),
        ("L['self']._modules['model']._modules['blocks']._modules['0']", "model.blocks.0"),
        ("L['step'].__closure__[2].cell_contents.head", "head"),
        ("L['head']", "head"),
        ("getattr(G['m'], '1')", "1"),
        ("getattr(getattr(L['self'].blocks, '3').mlp, '0')", "blocks.3.mlp.0"),
        ("L['fn'].__self__.lm_head", "lm_head"),
    ],
)
def test_names_are_those_of_named_modules(path: str, name: str) -> None:
    assert qualified_name(node_in(path, torch.nn.Linear)) == name


def test_the_innermost_line_is_the_users() -> None:
    node = fx.Graph().placeholder("x")
    outer = '  File "train.py", line 3, in step\n    loss = model(x)\n'
    node.meta["stack_trace"] = outer + '  File "model.py", line 7, in forward\n    return f(x)\n'
    assert source_line(node) == "model.py:7: return f(x)"
    assert source_line(fx.Graph().placeholder("y")) == ""


def graph_of(function: Callable[..., object], *arguments: object) -> fx.Graph:
    graphs: list[fx.Graph] = []

    def backend(gm: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        graphs.append(gm.graph)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend)(*arguments)
    (graph,) = graphs
    return graph


def test_the_modes_that_a_node_runs_under() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        with torch.no_grad():
            z = y.cos()
            with torch.autocast("cpu", torch.bfloat16):
                u = z.exp()
        return u + y.tan()

    graph = graph_of(step, torch.randn(3, requires_grad=True))
    region = Region(fx.GraphModule({}, graph))
    nodes = {str(node.target).rpartition(".")[-1]: node for node in region.graph.nodes if node.op == "call_method"}
    modes = {name: region.modes[node] for name, node in nodes.items()}
    assert modes["sin"] == modes["tan"] == (None,)
    assert [len(modes[name]) for name in ("cos", "exp")] == [1, 2]
    assert region.last_with_gradients(nodes["tan"]) is nodes["tan"]
    off = region.last_with_gradients(nodes["exp"])
    assert off is modes["cos"][0]
    assert region.order[nodes["sin"]] < region.order[off] < region.order[nodes["cos"]]

"""The editor: functions traced into a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from structfly.rewriter.editor import Editor


def traced(function: Callable[..., Tensor], *arguments: Tensor, nest: bool = False, dynamic: bool = False) -> Any:
    """What ``function`` becomes in a graph that would return the sum of its arguments; and the nodes."""
    graphs: list[fx.Graph] = []

    def backend(gm: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        inputs = [node for node in gm.graph.find_nodes(op="placeholder") if isinstance(value_of(node), Tensor)]
        (output,) = gm.graph.find_nodes(op="output")
        (old,) = output.args[0]
        editor = Editor(gm.graph, old)
        new = (
            editor.trace(lambda group: function(*group["all"]), {"all": inputs})
            if nest
            else editor.trace(function, *inputs)
        )
        assert torch.empty_like(value_of(new), device="meta").shape == value_of(new).shape
        editor.replace(old, new)
        editor.erase([old])
        editor.commit()
        gm.recompile()
        graphs.append(gm.graph)
        return gm.forward

    def stand_for(*tensors: Tensor) -> Tensor:
        return torch.stack([tensor.sum() for tensor in tensors]).sum()

    torch._dynamo.reset()
    value = torch.compile(stand_for, backend=backend, dynamic=dynamic)(*arguments)
    return value, graphs[0]


def value_of(node: fx.Node) -> Any:
    return node.meta["example_value"]


X, Y = torch.randn(3, 4), torch.randn(4, 3)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: x @ y,
        lambda x, y: (1 - x) * 2 + y.t(),
        lambda x, y: torch.addmm(x @ y, x, y, alpha=0.5).relu_(),
        lambda x, y: x[:, None, 1:] - y.t()[..., None],
        lambda x, y: torch.cat([x, y.t()], dim=0).split([2, 4])[1],
        lambda x, y: torch.stack((torch.frexp(x)[0], y.t().topk(2).values.sum(-1, keepdim=True).expand(3, 4))),
        lambda x, y: x.reshape(x.shape[1], -1) if x.is_contiguous() and not x.requires_grad else y,
    ],
)
@pytest.mark.parametrize("nest", [False, True])
def test_a_traced_function_does_what_it_does(function: Callable[..., Tensor], nest: bool) -> None:
    value, graph = traced(function, X, Y, nest=nest)
    assert torch.equal(value, function(X, Y))
    (output,) = graph.find_nodes(op="output")
    assert value_of(output.args[0][0]).shape == value.shape


def test_a_traced_function_keeps_sizes_that_vary() -> None:
    value, graph = traced(lambda x, y: torch.sigmoid(x @ y) * 2, X, Y, dynamic=True)
    assert torch.equal(value, torch.sigmoid(X @ Y) * 2)
    (product,) = (node for node in graph.nodes if node.target == "matmul")
    assert not all(isinstance(size, int) for size in value_of(product).shape)


def test_a_traced_function_must_be_given_its_tensors() -> None:
    other = torch.randn(3, 4)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        traced(lambda x, y: x + other, X, Y)
    assert "pass it" in str(caught.value) or "fake" in str(caught.value).lower()

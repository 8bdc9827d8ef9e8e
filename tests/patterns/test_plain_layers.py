"""Layers of torch's own products, written into compiled graphs as such."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from structfly import StructuredLinear, compat
from structfly.lowering.layer_op import FORWARD_OPS
from structfly.patterns.low_rank import LowRank
from structfly.patterns.monarch import Monarch
from structfly.patterns.pivoted_low_rank import PivotedLowRank
from structfly.patterns.plain_layers import write_out_plain_layers
from structfly.patterns.structure import Structure
from tests.oracle import assert_like_eager


class WrittenOut:
    """A function whose graphs have gone through the pass; ``ops`` are the structured layers' that are left."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.graphs: list[fx.GraphModule] = []
        torch._dynamo.reset()
        self._compiled = torch.compile(function, backend=self._backend)

    def _backend(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        write_out_plain_layers(gm)
        self.graphs.append(gm)
        made: Callable[..., Any] = torch._dynamo.lookup_backend("aot_eager")(gm, example_inputs)
        return made

    def __call__(self, *arguments: Any) -> Any:
        return self._compiled(*arguments)

    @property
    def ops(self) -> int:
        bodies = [module for gm in self.graphs for module in gm.modules() if isinstance(module, fx.GraphModule)]
        return sum(node.target in FORWARD_OPS for body in bodies for node in body.graph.nodes)


def layer_of(structure: Structure, *, bias: bool = True) -> StructuredLinear:
    torch.manual_seed(0)
    return StructuredLinear(structure, 12, 16, bias=bias)


@settings(max_examples=10, deadline=None)
@given(
    structure=st.sampled_from([LowRank(rank=3), PivotedLowRank(rank=3), LowRank(rank=3, rematerialise=True)]),
    rows=st.lists(st.integers(1, 5), min_size=0, max_size=3),
    bias=st.booleans(),
    trains=st.booleans(),
)
def test_values_and_gradients_are_those_of_the_layer(
    structure: Structure, rows: list[int], bias: bool, trains: bool
) -> None:
    layer = layer_of(structure, bias=bias).requires_grad_(trains)
    leaves = [torch.randn(*rows, 12, requires_grad=trains), *layer.parameters()]
    names = [name for name, _ in layer.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)
        return y

    fast = WrittenOut(call)
    assert_like_eager(fast, call, leaves, upstream=torch.randn(*rows, 16))
    assert fast.ops == (trains and structure.rematerialise)  # type: ignore[attr-defined]


def test_layers_with_kernels_of_their_own_stay_ops() -> None:
    fast = WrittenOut(
        nn.Sequential(
            layer_of(Monarch(blocks_in=4, blocks_out=4, block_rank=1)), StructuredLinear(LowRank(rank=3), 16, 12)
        )
    )
    fast(torch.randn(2, 12))
    assert fast.ops == 1


def test_bodies_of_checkpoints_are_written_out() -> None:
    layer = layer_of(LowRank(rank=3))
    fast = WrittenOut(lambda x: checkpoint(layer, x, use_reentrant=False))
    x = torch.randn(2, 12, requires_grad=True)
    fast(x).sum().backward()
    assert fast.ops == 0
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_casts_what_the_op_casts(dtype: torch.dtype) -> None:
    layer, x = layer_of(LowRank(rank=3)).to(dtype), torch.randn(2, 12, dtype=dtype)

    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y: Tensor = layer(x)
            return y

    fast = WrittenOut(call)
    assert fast(x).dtype == call(x).dtype
    assert fast.ops == 0


def test_the_backend_writes_them_out(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Any]] = []

    def compiled(gm: fx.GraphModule, *_: Any) -> Callable[..., Any]:
        seen.append([node.target for node in gm.graph.nodes if node.op == "call_function"])
        return gm.forward

    monkeypatch.setattr(compat, "compile_with_inductor", compiled)
    torch._dynamo.reset()
    torch.compile(layer_of(LowRank(rank=3)), backend="structfly")(torch.randn(2, 12))
    assert seen == [[torch.nn.functional.linear] * 2]

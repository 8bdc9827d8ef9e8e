"""TF32 as torch's setting has it: read where graphs are traced, handed from a layer's forward to its backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from structfly.lowering.block_products.support import why_no_products
from structfly.lowering.kronecker import lattice, monarch
from structfly.lowering.kronecker.op import KRONECKER
from structfly.lowering.kronecker.reference import kronecker_reference
from structfly.lowering.layer_op import FORWARD_OPS
from structfly.lowering.precision import tf32_allowed
from tests.dispatched import Dispatched
from tests.oracle import assert_like_eager
from tests.precision import matmul_precision

SHAPES = [(1, 2, 16, 1, 8, 1), (2, 1, 1, 8, 16, 1)]


def test_it_is_read_however_it_was_set() -> None:
    for name in ("tf32", "ieee"):
        with matmul_precision(name):
            assert tf32_allowed() == (name == "tf32")
    before = torch.get_float32_matmul_precision()
    for word in ("high", "highest"):
        torch.set_float32_matmul_precision(word)
        found = tf32_allowed()
        torch.set_float32_matmul_precision(before)
        assert found == (word == "high")


def test_a_graph_is_traced_again_where_the_setting_is_another() -> None:
    graphs: list[fx.GraphModule] = []

    def backend(graph: fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True)
    def number(x: Tensor) -> Tensor:
        return x + (2.0 if tf32_allowed() else 1.0)

    found = []
    for name in ("ieee", "tf32", "ieee", "tf32"):
        with matmul_precision(name):
            found.append(number(torch.zeros(())).item())
    assert found == [1.0, 2.0, 1.0, 2.0]
    assert len(graphs) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["ieee", "tf32"])
def test_only_calls_in_float32_on_gpus_are_told(dtype: torch.dtype, device: str, name: str) -> None:
    with matmul_precision(name), FakeTensorMode(), torch.no_grad(), Dispatched() as ran:
        x, *factors = (torch.empty(shape, dtype=dtype, device=device) for shape in [(3, 16), *SHAPES])
        KRONECKER(x, factors, None, [16])
    (arguments,) = ran.arguments_of(FORWARD_OPS)
    assert arguments[-1] == (name == "tf32" and device == "cuda" and dtype == torch.float32)


@pytest.mark.parametrize("tf32", [False, True])
def test_a_backward_makes_the_products_of_its_forward(tf32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept between is stored as those products store it; the setting is neither here."""

    def why(values: Tensor, sides: Iterable[int], tf32: bool) -> str:
        on_gpu: Any = SimpleNamespace(is_cuda=True, dtype=values.dtype, element_size=values.element_size)
        return why_no_products(on_gpu, sides, tf32)

    made: list[str] = []
    for module in (lattice, monarch):
        monkeypatch.setattr(module, "why_no_products", why)
    for name in ("matrix_products", "matrix_gradients"):
        monkeypatch.setattr(monarch, name, _noted(getattr(monarch, name), made))

    def fast(x: Tensor, *factors: Tensor) -> Tensor:
        y: Tensor = KRONECKER._forward_op(x, factors, None, [16], True, "", tf32)[0]
        return y

    def slow(x: Tensor, *factors: Tensor) -> Tensor:
        return kronecker_reference(x, factors, 16)

    leaves = [torch.randn(shape).requires_grad_() for shape in [(5, 16), *SHAPES]]
    assert_like_eager(fast, slow, leaves)
    products, gradients = "matrix_products", "matrix_gradients"
    assert made == ([products, products, gradients, products, gradients, products] if tf32 else [])


def _noted(function: Callable[..., Any], made: list[str]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        made.append(function.__name__)
        return function(*arguments, **named)

    return call


def test_what_is_left_to_torch_has_a_reason() -> None:
    def reason(dtype: torch.dtype, tf32: bool, side: int = 8) -> str:
        values: Any = SimpleNamespace(is_cuda=True, dtype=dtype, element_size=lambda: dtype.itemsize)
        return why_no_products(values, (side,), tf32)

    assert "where torch's setting lets them be in TF32" in reason(torch.float32, False)
    assert reason(torch.float32, True) == ""
    assert reason(torch.float32, True, side=12) == ""
    assert "no multiples of 16 bytes" in reason(torch.float32, True, side=6)
    assert reason(torch.bfloat16, False) == ""
    assert "they are torch.float64" in reason(torch.float64, True)

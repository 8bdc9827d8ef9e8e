"""Every structure by name, as users take it: compiled, under autocast, on CUDA devices."""

from __future__ import annotations

import pytest
import torch

from structfly.patterns.structure import Structure
from structfly.patterns.structures import OFFERED, STRUCTURES
from structfly.records.layer import LayerSizes
from tests.patterns.structures import ROUNDINGS, check_products, layer_of

SIZES = LayerSizes(256, 128)


def middle(name: str) -> Structure:
    """The setting in the middle of a structure's menu."""
    menu = STRUCTURES[name].menu(SIZES)
    return menu[len(menu) // 2]


def test_what_is_offered_is_there() -> None:
    assert set(OFFERED) <= set(STRUCTURES)
    assert [each.name for each in STRUCTURES.values()] == list(STRUCTURES)


# Inductor's workers warn of torch's own deprecations.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", STRUCTURES)
def test_compiled_without_graph_breaks(name: str) -> None:
    torch._dynamo.reset()
    layer = layer_of(middle(name), SIZES, torch.float32)
    x = torch.randn(5, SIZES.in_features, requires_grad=True)
    compiled = torch.compile(layer, backend="structfly", fullgraph=True)
    made = torch.autograd.grad(compiled(x).sum(), [x, *layer.parameters()])
    expected = torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])
    for one, other in zip(made, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", STRUCTURES)
def test_autocast_multiplies_in_its_dtype(name: str) -> None:
    layer = layer_of(middle(name), SIZES, torch.float32)
    x = torch.randn(5, SIZES.in_features)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.1, atol=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ROUNDINGS)
@pytest.mark.parametrize("name", STRUCTURES)
def test_as_accurate_as_the_dense_weight_on_cuda(name: str, dtype: torch.dtype) -> None:
    check_products(middle(name), SIZES, dtype, ROUNDINGS[dtype], "cuda")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores.*:UserWarning")  # Inductor's, of float32 products
@pytest.mark.parametrize("name", STRUCTURES)
def test_compiled_on_cuda(name: str) -> None:
    torch._dynamo.reset()
    layer = layer_of(middle(name), SIZES, torch.float32).cuda()
    x = torch.randn(5, SIZES.in_features, device="cuda")
    compiled = torch.compile(layer, backend="structfly", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))

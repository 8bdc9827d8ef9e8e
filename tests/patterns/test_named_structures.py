"""Every structure by name, as users take it: compiled, under autocast, on CUDA devices."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from structfly.lowering import layer_flops
from structfly.patterns.structure import Structure, StructuredLinear
from structfly.patterns.structures import OFFERED, STRUCTURES
from structfly.records.layer import LayerSizes
from tests.patterns.structures import ROUNDINGS, check_products, layer_of

_REGISTERED = layer_flops  # imported for what it registers
SIZES = LayerSizes(256, 128)


def middle(name: str) -> Structure:
    """The setting in the middle of a structure's menu."""
    menu = STRUCTURES[name].menu(SIZES)
    return menu[len(menu) // 2]


def test_what_is_offered_is_there() -> None:
    assert set(OFFERED) <= set(STRUCTURES)
    assert [each.name for each in STRUCTURES.values()] == list(STRUCTURES)


@pytest.mark.parametrize("name", STRUCTURES)
def test_menus_save_parameters_and_fit(name: str) -> None:
    for structure in STRUCTURES[name].menu(SIZES):
        assert structure.why_not(SIZES) == ""
        assert structure.cost(SIZES, torch.float32).at(1)["parameters"] < SIZES.parameters


@pytest.mark.parametrize("name", STRUCTURES)
def test_predicted_flops_and_saved_bytes_are_the_real_ones(name: str) -> None:
    structure = middle(name)
    layer = StructuredLinear(structure, *SIZES, bias=False)
    x = torch.randn(7, SIZES.in_features, requires_grad=True)
    saved: dict[int, int] = {}
    known = {tensor.data_ptr() for tensor in (x, *layer.parameters(), *layer.buffers())}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in known:
            saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        y = layer(x)
    cost = structure.cost(SIZES, torch.float32).at(7)
    assert y.shape == (7, SIZES.out_features)
    assert cost["flops"] == counter.get_total_flops()
    assert cost["saved_bytes"] == sum(saved.values())


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
@pytest.mark.parametrize("name", STRUCTURES)
def test_compiled_on_cuda(name: str) -> None:
    torch._dynamo.reset()
    layer = layer_of(middle(name), SIZES, torch.float32).cuda()
    x = torch.randn(5, SIZES.in_features, device="cuda")
    compiled = torch.compile(layer, backend="structfly", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))

"""GBLR while it is learned, and cut to tiles."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from structfly.errors import ArgumentError
from structfly.patterns import gblr_tiles
from structfly.patterns.gblr import GBLR
from structfly.patterns.gblr_learned import GaudiGBLR, GaudiGBLRConv2d
from structfly.patterns.structure import StructuredLinear
from tests.oracle import assert_like_eager
from tests.patterns.structures import Largest


def drawn(layer: GaudiGBLR, seed: int, sigma: float = math.inf) -> GaudiGBLR:
    """The layer with random widths, some of them 0 but for the first component's, and locations, on both sides."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith(("widths", "locations")):
                values = torch.rand(parameter.shape, generator=generator)
                parameter.copy_(values * (values > 0.2) if name.endswith("widths") else values)
        layer.row_widths[0] = layer.column_widths[0] = 0.6
    layer.anneal(sigma)
    return layer


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.tuples(st.integers(3, 20), st.integers(3, 20)),
    sigma=st.sampled_from([1.0, 5.0, math.inf]),
    seed=st.integers(0, 100),
    bias=st.booleans(),
)
def test_layer_is_that_of_its_dense_weight(sizes: tuple[int, int], sigma: float, seed: int, bias: bool) -> None:
    layer = drawn(GaudiGBLR(*sizes, bias=bias, dtype=torch.float64), seed, sigma)
    names, values = zip(*layer.named_parameters(), strict=True)
    x = torch.randn(2, 3, sizes[0], dtype=torch.float64, requires_grad=True)
    arguments = [x, *(value.detach().requires_grad_() for value in values)]

    def fast(x: Tensor, *parameters: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)
        return result.square().sum()

    def dense(x: Tensor, *parameters: Tensor) -> Tensor:
        held = dict(zip(names, parameters, strict=True))
        made = copy.deepcopy(layer)
        for name in names:
            delattr(made, name)
            setattr(made, name, held[name])
        return F.linear(x, made.to_dense(), held.get("bias")).square().sum()

    assert_like_eager(fast, dense, arguments, torch.float64)


def test_forward_and_backward_make_no_dense_weight() -> None:
    layer = GaudiGBLR(64, 64, components=8)
    with Largest() as largest:
        layer(torch.randn(4, 64)).sum().backward()
    assert largest.elements < 64 * 64 / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_full_masks_are_the_linear_layer(dtype: torch.dtype) -> None:
    linear = nn.Linear(24, 18, dtype=dtype).eval()
    layer = GaudiGBLR.from_linear(linear)
    assert layer.components == 18
    assert not layer.training
    assert layer.right.dtype == dtype
    assert layer.row_widths.dtype == torch.promote_types(dtype, torch.float32)
    for sigma in (1.0, math.inf):
        layer.anneal(sigma)
        bound = 32 * torch.finfo(dtype).eps
        torch.testing.assert_close(layer.to_dense(), linear.weight, rtol=0, atol=bound)
    assert layer.bias is not None
    assert torch.equal(layer.bias, linear.bias)


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.tuples(st.integers(5, 40), st.integers(5, 40)),
    tile=st.integers(1, 8),
    group=st.integers(1, 6),
    seed=st.integers(0, 100),
    rematerialise=st.booleans(),
)
def test_finalised_layer_computes_the_same(
    sizes: tuple[int, int], tile: int, group: int, seed: int, rematerialise: bool
) -> None:
    layer = drawn(GaudiGBLR(*sizes, dtype=torch.float64), seed)
    final = layer.finalise(tile, group, rematerialise=rematerialise)
    assert isinstance(final, StructuredLinear)
    assert isinstance(final.structure, GBLR)
    assert final.structure.rematerialise == rematerialise
    torch.testing.assert_close(final.to_dense(), layer.to_dense(), rtol=0, atol=1e-10)
    x = torch.randn(3, sizes[0], dtype=torch.float64)
    torch.testing.assert_close(final.forward(x), layer(x), rtol=0, atol=1e-10)


def test_groups_share_tiles() -> None:
    layer = GaudiGBLR(32, 32, components=16)
    with torch.no_grad():
        layer.row_widths.fill_(0.25)
        layer.column_widths.fill_(0.25)
        places = torch.arange(16) % 4 / 4.0  # four blocks, their components in turn
        layer.row_locations.copy_(places)
        layer.column_locations.copy_(places)
    final = layer.finalise(tile=8, group=4)
    assert isinstance(final, StructuredLinear)
    assert final.structure == GBLR(tile=8, group=4, groups=4, right_tiles=4, left_tiles=4)


def test_each_side_has_its_components_in_an_order_of_its_own() -> None:
    layer = GaudiGBLR(32, 32, components=16, dtype=torch.float64)
    with torch.no_grad():
        layer.row_widths.fill_(0.25)
        layer.column_widths.fill_(0.25)
        layer.row_locations.copy_(torch.arange(16) % 4 / 4.0)
        layer.column_locations.copy_(torch.arange(16) // 4 / 4.0)  # no two components share both places
    final = layer.finalise(tile=8, group=4)
    assert isinstance(final, StructuredLinear)
    assert final.structure == GBLR(tile=8, group=4, groups=4, right_tiles=4, left_tiles=4)
    torch.testing.assert_close(final.to_dense(), layer.to_dense(), rtol=0, atol=1e-12)


def test_intervals_of_one_width_are_sorted_by_their_places() -> None:
    layer = GaudiGBLR(256, 256, components=128)
    with torch.no_grad():
        for side in ("row", "column"):
            getattr(layer, f"{side}_widths").fill_(0.25)
            places = torch.rand(128, generator=torch.Generator().manual_seed(len(side)))
            getattr(layer, f"{side}_locations").copy_(places)
    final = layer.finalise(tile=8, group=16)
    assert isinstance(final, StructuredLinear)
    assert isinstance(final.structure, GBLR)
    # Eight groups of intervals 8 tiles wide, whose beginnings are spread over about 4 of 32: 13 with both ends cut.
    assert final.structure.right_tiles <= 8 * 14
    assert final.structure.left_tiles <= 8 * 14


@settings(max_examples=30, deadline=None)
@given(components=st.integers(1, 40), places=st.integers(1, 12), group=st.integers(1, 9), seed=st.integers(0, 1000))
def test_groups_are_full_but_for_the_last(components: int, places: int, group: int, seed: int) -> None:
    touched = torch.rand(components, places, generator=torch.Generator().manual_seed(seed)) < 0.4
    groups = gblr_tiles._grouped(touched, group)
    assert torch.equal(torch.cat(groups).sort().values, torch.arange(components))
    assert all(len(members) == group for members in groups[:-1])


def test_values_below_the_threshold_are_left_out() -> None:
    layer = drawn(GaudiGBLR(64, 64, components=6), 1, sigma=100.0)
    final, whole = (layer.finalise(8, 2, threshold) for threshold in (1e-3, 0.0))
    assert isinstance(final, StructuredLinear)
    assert isinstance(whole, StructuredLinear)
    assert final.factors["right"].numel() < whole.factors["right"].numel()
    torch.testing.assert_close(whole.to_dense(), layer.to_dense())
    torch.testing.assert_close(final.to_dense(), layer.to_dense(), rtol=0, atol=1e-2)


@settings(max_examples=12, deadline=None)
@given(
    kernel=st.sampled_from([(1, 1), (3, 3), (2, 3)]),
    stride=st.integers(1, 2),
    padding=st.sampled_from([0, 1, "same", "valid"]),
    dilation=st.integers(1, 2),
    bias=st.booleans(),
)
@example(kernel=(2, 3), stride=1, padding="same", dilation=1, bias=True)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
def test_convolutions(kernel: tuple[int, int], stride: int, padding: int | str, dilation: int, bias: bool) -> None:
    stride = 1 if padding == "same" else stride
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 7, kernel, stride, padding, dilation, bias=bias, dtype=torch.float64)
    layer = GaudiGBLRConv2d.from_conv(conv)
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), conv(x), rtol=0, atol=1e-10)
    drawn(layer, 3)
    weight = layer.to_dense().view_as(conv.weight)
    assert not torch.allclose(weight, conv.weight)
    with torch.no_grad():
        conv.weight.copy_(weight)
    torch.testing.assert_close(layer(x), conv(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(layer.finalise(tile=4, group=2)(x), conv(x), rtol=0, atol=1e-10)


def test_locations_and_widths_are_learned() -> None:
    torch.manual_seed(0)
    weight = torch.zeros(24, 24)
    weight[6:12, 12:18] = torch.randn(6, 2) @ torch.randn(2, 6)
    layer = GaudiGBLR(24, 24, components=2, bias=False, width=0.5)
    with torch.no_grad():
        layer.row_locations.fill_(0.15)
        layer.column_locations.fill_(0.4)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    for step in range(600):
        layer.anneal(1 + step / 60)
        loss = (layer.to_dense() - weight).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1e-2 * weight.square().sum()


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ArgumentError, match="components=9 for a layer 8 -> 16: 1 to 8 there"):
        GaudiGBLR(8, 16, 9)
    with pytest.raises(ArgumentError, match=r"width=0\.0"):
        GaudiGBLR(8, 16, width=0.0)
    layer = GaudiGBLR(8, 16)
    for sigma in (0.0, math.nan):
        with pytest.raises(ArgumentError, match="sigma="):
            layer.anneal(sigma)
    with torch.no_grad():
        layer.row_widths.zero_()
    with pytest.raises(ArgumentError, match="every component is empty"):
        layer.finalise()
    with pytest.raises(ArgumentError, match="groups=2"):
        GaudiGBLRConv2d(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(ArgumentError, match="padding_mode='reflect'"):
        GaudiGBLRConv2d(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"))

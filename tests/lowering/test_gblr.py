"""The op of tile-sparse factors against its specification, and its products on any set of tiles."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structfly.lowering.gblr.op import GBLR
from structfly.lowering.gblr.reference import gblr_reference
from structfly.lowering.gblr.tile_products import dense_of
from tests.oracle import assert_like_eager


def index(draw: st.DrawFn, groups: int, places: int) -> Tensor:
    """Tiles in any order: those that follow each other need not be neighbours, nor neighbours follow each other."""
    every = [(group, place) for group in range(groups) for place in range(places)]
    chosen = draw(st.lists(st.sampled_from(every), unique=True, min_size=1, max_size=8))
    if draw(st.booleans()):
        chosen.sort()
    return torch.tensor(chosen, dtype=torch.int32).t().contiguous()


@settings(max_examples=40, deadline=None)
@given(
    in_features=st.integers(1, 20),
    out_features=st.integers(1, 20),
    tile=st.integers(1, 5),
    group=st.integers(1, 3),
    groups=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    rematerialise=st.booleans(),
    data=st.data(),
)
def test_op_is_its_reference(
    in_features: int,
    out_features: int,
    tile: int,
    group: int,
    groups: int,
    dtype: torch.dtype,
    rematerialise: bool,
    data: st.DataObject,
) -> None:
    torch.manual_seed(0)
    of_right, of_left = (
        data.draw(st.composite(index)(groups, -(-features // tile))) for features in (in_features, out_features)
    )
    shapes = [(2, 3, in_features), (of_right.shape[1], tile, group), (of_left.shape[1], tile, group), (out_features,)]
    arguments = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    order = torch.tensor(data.draw(st.permutations(range(groups * group))), dtype=torch.int32)

    def op(x: Tensor, right: Tensor, left: Tensor, bias: Tensor) -> Tensor:
        factors = [right, of_right, left, of_left, order]
        return GBLR(x, factors, bias, [out_features], rematerialise=rematerialise)

    def reference(x: Tensor, right: Tensor, left: Tensor, bias: Tensor) -> Tensor:
        return gblr_reference(x, right, of_right, left, of_left, order, bias, out_features)

    assert_like_eager(op, reference, arguments, dtype, upstream=torch.randn(2, 3, out_features).to(dtype))


def test_many_components_of_bfloat16_are_summed_in_float32() -> None:
    torch.manual_seed(0)
    groups, count = 64, 64
    each = torch.stack((torch.arange(groups), torch.zeros(groups, dtype=torch.int64))).int()
    order = torch.arange(2 * groups, dtype=torch.int32)
    x, right, left = (torch.randn(s).bfloat16() for s in ((count, 8), (groups, 8, 2), (groups, 8, 2)))
    exact, eager = (
        gblr_reference(x.to(dtype), right.to(dtype), each, left.to(dtype), each, order, None, 8)
        for dtype in (torch.float64, torch.bfloat16)
    )
    y = GBLR(x, [right, each, left, each, order], None, [8])
    assert (y.double() - exact).norm() <= (eager.double() - exact).norm() + exact.norm() * 2**-8


def test_dense_of_puts_tiles_where_the_index_says() -> None:
    tiles = torch.arange(12.0).view(2, 2, 3)
    dense = dense_of(tiles, torch.tensor([[1, 0], [0, 2]], dtype=torch.int32), 5, 2)
    expected = torch.zeros(5, 6)
    expected[0:2, 3:6] = tiles[0]
    expected[4, 0:3] = tiles[1, 0]
    assert torch.equal(dense, expected)


@pytest.mark.parametrize("frozen", range(3))
def test_only_the_gradients_asked_for_are_made(frozen: int) -> None:
    each = torch.tensor([[0, 0, 1], [0, 1, 1]], dtype=torch.int32)
    x, right, left = (
        torch.randn(shape, requires_grad=number != frozen)
        for number, shape in enumerate([(4, 6), (3, 3, 2), (3, 3, 2)])
    )
    GBLR(x, [right, each, left, each, torch.arange(4, dtype=torch.int32)], None, [6]).sum().backward()
    assert [tensor.grad is None for tensor in (x, right, left)] == [number == frozen for number in range(3)]

"""Products along an axis of a lattice, interpreted on a CPU: ragged sides, any tiles, tokens in ranges."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structfly.errors import UnsupportedError
from structfly.lowering.activations import activated
from structfly.lowering.block_products.axes import axis_gradients, axis_products
from structfly.lowering.gemm import Tiles
from tests.lowering.block_products.test_products import DEVICE, DTYPES, NAMES, random, roundings
from tests.oracle import assert_as_accurate

SIDES = st.sampled_from((8, 16, 24, 40))
INNER = st.sampled_from((1, 8, 24))
OUTER = st.integers(1, 3)
TILES = st.sampled_from((Tiles(16, 16, 16, 2, 1, 4, 1), Tiles(16, 32, 16, 1, 1, 4, 2), Tiles(32, 16, 32, 3, 1, 4, 1)))
BATCHES = st.sampled_from((8, 16))


@settings(max_examples=12, deadline=None)
@given(
    tokens=st.integers(0, 40),
    outer=OUTER,
    inner=INNER,
    sides=st.tuples(SIDES, SIDES),
    turned=st.booleans(),
    bias=st.booleans(),
    activation=NAMES,
    dtype=st.sampled_from(DTYPES),
    tiles=TILES,
    batch=BATCHES,
)
def test_products_are_as_accurate_as_eager(
    tokens: int,
    outer: int,
    inner: int,
    sides: tuple[int, int],
    turned: bool,
    bias: bool,
    activation: str,
    dtype: torch.dtype,
    tiles: Tiles,
    batch: int,
) -> None:
    side_n, side_k = sides
    a, b = random(dtype, 0, tokens, outer, side_k, inner), random(dtype, 1, inner, outer, side_n, side_k)
    stored = b.mT.contiguous() if turned else b
    added = random(dtype, 2, outer, side_n, inner) if bias else None
    c = torch.full((tokens, outer, side_n, inner), float("nan"), dtype=dtype, device=DEVICE)
    axis_products(a, stored, c, tiles=tiles, batch=batch, turned=turned, bias=added, activation=activation)

    def reference(wide: torch.dtype) -> Tensor:
        made = torch.einsum("toki,ionk->toni", a.to(wide), b.to(wide))
        return activated(made if added is None else made + added.to(wide), activation)

    assert_as_accurate(
        c, reference(torch.float32).to(dtype), reference(torch.float64), dtype, "products", roundings(dtype)
    )


@settings(max_examples=12, deadline=None)
@given(
    tokens=st.integers(0, 140),
    outer=OUTER,
    inner=INNER,
    sides=st.tuples(SIDES, SIDES),
    dtype=st.sampled_from(DTYPES),
    tiles=TILES,
    batch=BATCHES,
)
def test_gradients_are_as_accurate_as_eager(
    tokens: int, outer: int, inner: int, sides: tuple[int, int], dtype: torch.dtype, tiles: Tiles, batch: int
) -> None:
    a, b = (random(dtype, seed, tokens, outer, side, inner) for seed, side in enumerate(sides))
    made = axis_gradients(a, b, tiles=tiles, batch=batch)

    def reference(wide: torch.dtype) -> Tensor:
        return torch.einsum("tomi,toni->iomn", a.to(wide), b.to(wide))

    assert_as_accurate(
        made, reference(torch.float32).to(dtype), reference(torch.float64), dtype, "gradients", roundings(dtype)
    )


def test_ranges_of_tokens_are_summed_with_the_same_bits_every_time() -> None:
    a, b = (random(torch.bfloat16, seed, 100, 1, 8, 8) for seed in range(2))
    made = [axis_gradients(a, b, tiles=Tiles(16, 16, 16, 2, 1, 4, 1), batch=8) for _ in range(2)]
    assert torch.equal(*made)
    exact = torch.einsum("tomi,toni->iomn", a.double(), b.double())
    assert ((made[0].double() - exact).norm() / exact.norm()).item() < torch.finfo(torch.bfloat16).eps


def test_operands_without_descriptors_are_refused() -> None:
    a, b = random(torch.bfloat16, 0, 8, 1, 16, 12), random(torch.bfloat16, 1, 12, 1, 16, 16)
    c = torch.empty_like(a)
    with pytest.raises(UnsupportedError, match="begin at multiples of 16 bytes"):
        axis_products(a, b, c, tiles=Tiles(16, 16, 16, 2, 1, 4, 1), batch=8)

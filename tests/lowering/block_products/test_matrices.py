"""Products with many matrices at once, interpreted on a CPU: sides of two axes in any order, ragged, with any tiles."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structfly.errors import UnsupportedError
from structfly.lowering.activations import activated
from structfly.lowering.block_products.matrices import Cut, matrix_gradients, matrix_products
from structfly.lowering.block_products.matrix_tiles import gradient_tiles, matrix_gradient_cut, product_tiles
from structfly.lowering.gemm import TORCH_MM, Library, Tiles
from tests.lowering.block_products.test_products import DEVICE, DTYPES, LARGE, NAMES, SIDES, cuts, random, roundings
from tests.oracle import assert_as_accurate

HIGH = st.integers(1, 5)
LOW = st.sampled_from((8, 16, 24, 40))


@st.composite
def axes(draw: st.DrawFn) -> tuple[int, int]:
    """A high and a low axis."""
    return draw(HIGH), draw(LOW)


@settings(max_examples=12, deadline=None)
@given(
    tokens=st.integers(0, 70),
    matrices=st.integers(1, 4),
    n=axes(),
    k=SIDES,
    bias=st.booleans(),
    activation=NAMES,
    dtype=st.sampled_from(DTYPES),
    tiles=cuts(),
)
def test_products_are_as_accurate_as_eager(
    tokens: int,
    matrices: int,
    n: tuple[int, int],
    k: int,
    bias: bool,
    activation: str,
    dtype: torch.dtype,
    tiles: Tiles,
) -> None:
    n = (1, n[1]) if bias else n
    a, b = random(dtype, 0, tokens, matrices, 1, k), random(dtype, 1, matrices, *reversed(n), k).transpose(1, 2)
    added = random(dtype, 2, matrices, n[1]) if bias else None
    c = torch.full((tokens, n[0], matrices, n[1]), float("nan"), dtype=dtype, device=DEVICE).transpose(1, 2)
    matrix_products(a, b, c, tiles=tiles, bias=added, activation=activation)

    def reference(wide: torch.dtype) -> Tensor:
        made = torch.einsum("tmk,mhlk->tmhl", a[:, :, 0].to(wide), b.to(wide))
        return activated(made if added is None else made + added[:, None].to(wide), activation)

    assert_as_accurate(
        c, reference(torch.float32).to(dtype), reference(torch.float64), dtype, "products", roundings(dtype)
    )


@settings(max_examples=12, deadline=None)
@given(
    tokens=st.integers(0, 70),
    matrices=st.integers(1, 4),
    n=axes(),
    k=axes(),
    split=st.sampled_from(("n", "k")),
    dtype=st.sampled_from(DTYPES),
    tiles=cuts(),
)
def test_products_with_what_is_not_transposed_are_as_accurate_as_eager(
    tokens: int,
    matrices: int,
    n: tuple[int, int],
    k: tuple[int, int],
    split: str,
    dtype: torch.dtype,
    tiles: Tiles,
) -> None:
    n, k = (n, (1, k[1])) if split == "n" else ((1, n[1]), k)
    a = random(dtype, 0, tokens, matrices, *k)
    b = random(dtype, 1, matrices, *reversed(k), n[0] * n[1]).transpose(1, 2)
    c = torch.full((tokens, n[0], matrices, n[1]), float("nan"), dtype=dtype, device=DEVICE).transpose(1, 2)
    matrix_products(a, b, c, tiles=tiles, turned=True)

    def reference(wide: torch.dtype) -> Tensor:
        return torch.einsum("tmhl,mhln->tmn", a.to(wide), b.to(wide)).reshape(c.shape)

    assert_as_accurate(
        c, reference(torch.float32).to(dtype), reference(torch.float64), dtype, "products", roundings(dtype)
    )


@settings(max_examples=12, deadline=None)
@given(
    tokens=st.integers(0, 70),
    matrices=st.integers(1, 4),
    m=axes(),
    n=SIDES,
    dtype=st.sampled_from(DTYPES),
    tiles=st.one_of(cuts(), st.just(TORCH_MM)),
)
def test_gradients_are_as_accurate_as_eager(
    tokens: int, matrices: int, m: tuple[int, int], n: int, dtype: torch.dtype, tiles: Tiles | Library
) -> None:
    a, b = random(dtype, 0, tokens, matrices, m[0] * m[1]), random(dtype, 1, tokens, matrices, n)
    c = torch.full((matrices, *reversed(m), n), float("nan"), dtype=dtype, device=DEVICE).transpose(1, 2)
    matrix_gradients(a, b, c, tiles=tiles)

    def reference(wide: torch.dtype) -> Tensor:
        return torch.einsum("tmr,tmn->mrn", a.to(wide), b.to(wide)).reshape(c.shape)

    assert_as_accurate(
        c, reference(torch.float32).to(dtype), reference(torch.float64), dtype, "gradients", roundings(dtype)
    )


@given(high=st.integers(1, 20), low=st.integers(1, 20), power=st.integers(0, 6))
def test_boxes_have_every_entry_once(high: int, low: int, power: int) -> None:
    cut = Cut.of(high, low, 2**power)
    assert cut.box[0] * cut.box[1] == 2**power
    seen = [
        (cut.box[0] * i + h, cut.box[1] * j + l)
        for i in range(cut.tiles[0])
        for j in range(cut.tiles[1])
        for h in range(cut.box[0])
        for l in range(cut.box[1])  # noqa: E741
    ]
    inside = sorted(each for each in seen if each[0] < high and each[1] < low)
    assert inside == [(h, l) for h in range(high) for l in range(low)]  # noqa: E741


@given(tokens=st.integers(1, 300), n=axes(), k=axes())
def test_tiles_are_no_longer_than_twice_their_sides(tokens: int, n: tuple[int, int], k: tuple[int, int]) -> None:
    tiles = product_tiles(torch.empty(0, device=DEVICE), tokens, n, k)
    assert (tiles.m < 2 * max(tokens, 16), tiles.n < 2 * max(n[0] * n[1], 16)) == (True, True)
    assert tiles.k < 2 * max(k[0] * k[1], 16)
    assert gradient_tiles(torch.empty(0, device=DEVICE), tokens, 2, n, k[1]).m < 2 * max(n[0] * n[1], 16)


def test_gradients_of_float32_are_left_to_torch() -> None:
    assert matrix_gradient_cut(torch.empty(0, device=DEVICE), 300, 2, (1, 64), 64) == TORCH_MM
    like = torch.empty(0, device=DEVICE, dtype=torch.bfloat16)
    assert matrix_gradient_cut(like, 300, 2, (1, 64), 64) == gradient_tiles(like, 300, 2, (1, 64), 64)


def test_operands_without_descriptors_are_refused() -> None:
    a, b = random(torch.bfloat16, 0, 8, 1, 1, 12), random(torch.bfloat16, 1, 1, 1, 16, 12)
    c = torch.empty(8, 1, 1, 16, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(UnsupportedError, match="begin at multiples of 16 bytes"):
        matrix_products(a, b, c, tiles=LARGE)

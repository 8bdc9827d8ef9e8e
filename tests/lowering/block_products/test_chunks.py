"""Products for chunk after chunk of rows, interpreted on a CPU: ragged sides and rows, any tiles, any layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structfly.errors import UnsupportedError
from structfly.lowering.activations import activated
from structfly.lowering.block_products.chunks import chunk_gradients, chunk_products, rows_of_chunk
from structfly.lowering.gemm import Tiles
from tests.lowering.block_products.test_products import DEVICE, DTYPES, NAMES, SIDES, cuts, random, roundings
from tests.oracle import assert_as_accurate

WIDTH = 64  # rows of a chunk
ROWS = st.integers(1, 3 * WIDTH)


def in_float64(
    dtype: torch.dtype, product: str, a: Tensor, b: Tensor, bias: Tensor | None = None, activation: str = ""
) -> list[Tensor]:
    """What eager gives in ``dtype``, summed in float32, and the exact product."""
    made = []
    for wide in (torch.float32, torch.float64):
        result = torch.einsum(product, a.to(wide), b.to(wide))
        made.append(activated(result if bias is None else result + bias.to(wide)[:, None], activation))
    return [made[0].to(dtype), made[1]]


@settings(max_examples=15, deadline=None)
@given(rows=ROWS, matrices=st.integers(1, 3), m=SIDES, k=SIDES, turned=st.booleans(), tiles=cuts(), data=st.data())
def test_rows_become_columns_of_what_is_held(
    rows: int, matrices: int, m: int, k: int, turned: bool, tiles: Tiles, data: st.DataObject
) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    a, b = random(dtype, 0, matrices, m, k), random(dtype, 1, rows, matrices, k).transpose(0, 1)
    held = torch.full((matrices, m, WIDTH), float("nan"), dtype=dtype, device=DEVICE)
    stored = a.mT.contiguous() if turned else a
    step = chunk_products(stored, b, held, rows="b", a_turned=turned, tiles=tiles)
    eager, exact = in_float64(dtype, "imk,irk->imr", a, b)
    for start in range(0, rows, WIDTH):
        step(start)
        there = slice(start, start + WIDTH)
        count = exact[..., there].shape[2]
        assert_as_accurate(held[..., :count], eager[..., there], exact[..., there], dtype, "held", roundings(dtype))
        assert not held[..., count:].any()


@settings(max_examples=15, deadline=None)
@given(rows=ROWS, matrices=st.integers(1, 3), n=SIDES, k=SIDES, turned=st.booleans(), tiles=cuts(), data=st.data())
def test_columns_of_what_is_held_become_rows(
    rows: int, matrices: int, n: int, k: int, turned: bool, tiles: Tiles, data: st.DataObject
) -> None:
    dtype, with_bias, activation = data.draw(st.tuples(st.sampled_from(DTYPES), st.booleans(), NAMES))
    every, b = random(dtype, 0, matrices, k, rows), random(dtype, 1, matrices, n, k)
    bias = random(dtype, 2, matrices, n) if with_bias else None
    held = torch.zeros(matrices, k, WIDTH, dtype=dtype, device=DEVICE)
    c = torch.full((rows, matrices, n), float("nan"), dtype=dtype, device=DEVICE)
    stored = b.mT.contiguous() if turned else b
    step = chunk_products(
        held,
        stored,
        c.transpose(0, 1),
        rows="c",
        a_turned=True,
        b_turned=turned,
        bias=bias,
        activation=activation,
        tiles=tiles,
    )
    for start in range(0, rows, WIDTH):
        chunk = every[..., start : start + WIDTH]
        held[..., : chunk.shape[2]] = chunk
        step(start)
    eager, exact = in_float64(dtype, "ikr,ink->irn", every, b, bias, activation)
    assert_as_accurate(c.transpose(0, 1), eager, exact, dtype, "rows", roundings(dtype))


@settings(max_examples=15, deadline=None)
@given(
    rows=ROWS,
    matrices=st.integers(1, 3),
    sides=st.tuples(SIDES, SIDES),
    whole=st.sampled_from(("a", "b")),
    dtype=st.sampled_from(DTYPES),
    tiles=cuts(),
)
def test_gradients_are_added_up(
    rows: int, matrices: int, sides: tuple[int, int], whole: str, dtype: torch.dtype, tiles: Tiles
) -> None:
    a, b = (random(dtype, seed, rows, matrices, side).transpose(0, 1) for seed, side in enumerate(sides))
    held = torch.empty(matrices, sides[whole == "a"], WIDTH, dtype=dtype, device=DEVICE)
    before = random(torch.float32, 2, matrices, *sides)
    found = []
    for _ in range(2):
        c = before.clone()
        if whole == "a":
            step, source = chunk_gradients(a, held, c, rows="a", tiles=tiles), b
        else:
            step, source = chunk_gradients(held, b, c, rows="b", tiles=tiles), a
        for start in range(0, rows, WIDTH):
            chunk = source[:, start : start + WIDTH].mT
            held.zero_()
            held[..., : chunk.shape[2]] = chunk
            step(start)
        found.append(c)
    assert torch.equal(*found)
    exact = torch.einsum("irm,irn->imn", a.double(), b.double()) + before.double()
    eager = torch.einsum("irm,irn->imn", a.float(), b.float()) + before
    assert_as_accurate(found[0], eager, exact, torch.float32, "gradients", roundings(dtype))


def test_operands_without_descriptors_are_refused() -> None:
    a, b = random(torch.bfloat16, 0, 1, 16, 12), random(torch.bfloat16, 1, 1, 16, 12)
    c = torch.empty(1, 16, 16, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(UnsupportedError, match="begin at multiples of 16 bytes"):
        chunk_products(a, b, c, rows="b", tiles=Tiles(16, 16, 16, 2, 1, 4, 1))


@given(rows=st.integers(0, 5000), row_bytes=st.integers(1, 20), room=st.integers(-100, 10**5))
@settings(max_examples=100, deadline=None)
def test_chunks_are_equal_and_as_few_as_there_is_room_for(rows: int, row_bytes: int, room: int) -> None:
    made = rows_of_chunk(rows, row_bytes, room)
    if rows <= made:
        assert made == -(-rows // 8) * 8
        return
    count = -(-rows // made)
    assert made % 128 == 0
    assert made <= 256 or made * row_bytes <= room
    assert made - rows / count < 128  # none is much smaller
    fewer = -(-rows // ((count - 1) * 128)) * 128
    assert fewer > 256
    assert fewer * row_bytes > room


def test_few_rows_are_one_chunk() -> None:
    assert [rows_of_chunk(rows, 1000, 0) for rows in (0, 1, 250, 257)] == [0, 8, 256, 256]
    assert rows_of_chunk(5000, 2, 10000) == 5000

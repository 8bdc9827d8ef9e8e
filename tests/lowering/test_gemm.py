"""Products generated from the skeleton, interpreted: every layout, ragged shapes, and how they fill a device."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structfly.errors import UnsupportedError
from structfly.lowering.gemm import IDLE, Blocks, Product, Rounds, Tiles, best_split, busy, full_row_counts
from structfly.lowering.linear_cross_entropy.sums import new_plane, sum_product
from structfly.lowering.tuning.choice import INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HOPPER = Tiles(m=128, n=256, k=64, group=8, parts=4, warps=8, stages=3)


def cuts() -> st.SearchStrategy[Tiles]:
    """Tiles that a sum may have: small ones for the interpreter, what is run on a device for that."""
    if DEVICE == "cuda":
        return st.sampled_from((replace(HOPPER, group=4, parts=2), Tiles(64, 128, 32, 8, 2, 4, 2)))
    sides = st.sampled_from((16, 32))
    return st.builds(
        Tiles,
        m=sides,
        n=st.sampled_from((32, 64)),
        k=sides,
        group=st.integers(1, 3),
        parts=st.just(2),
        warps=st.just(1),
        stages=st.just(1),
    )


def matrix(rows: int, columns: int, *, transposed: bool, seed: int) -> Tensor:
    """A bfloat16 matrix whose rows, or columns, begin at multiples of 16 bytes."""
    shape = (columns, -(-rows // 8) * 8) if transposed else (rows, -(-columns // 8) * 8)
    stored = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(DEVICE)
    return stored.t()[:rows] if transposed else stored[:, :columns]


@settings(max_examples=20)
@given(
    sizes=st.tuples(*(st.integers(1, 70) for _ in range(3))),
    transposed=st.tuples(st.booleans(), st.booleans()),
    split=st.sampled_from((1, 2)),
    window=st.tuples(st.integers(0, 80), st.integers(0, 80)),
    tiles=cuts(),
)
def test_rows_that_count_are_multiplied(
    sizes: tuple[int, int, int], transposed: tuple[bool, bool], split: int, window: tuple[int, int], tiles: Tiles
) -> None:
    m, n, k = sizes
    a, b = matrix(m, k, transposed=transposed[0], seed=0), matrix(k, n, transposed=transposed[1], seed=1)
    live, start = window
    c = torch.zeros(m, -(-n // 4) * 4, device=DEVICE)[:, :n]
    product = Product("linear_cross_entropy_hidden", a, b, [Blocks(c)], tiles=tiles, split=split)
    product(torch.tensor(live, dtype=torch.int32, device=DEVICE), start)
    rows = min(m, max(live - start, 0))
    torch.testing.assert_close(
        c[:rows].cpu(), (a.cpu().double() @ b.cpu().double())[:rows].float(), rtol=1e-5, atol=1e-5
    )


def summed_over_calls(a: Tensor, b: Tensor, live: int, rows: int, tiles: Tiles, beside: Rounds = IDLE) -> Tensor:
    """a^T b of the first ``live`` rows, ``rows`` a call."""
    m, n = a.shape[1], b.shape[1]
    high = torch.empty(m, -(-n // 8) * 8, dtype=torch.bfloat16, device=DEVICE)[:, :n]
    plane = new_plane(high, tiles)
    count = torch.tensor(live, dtype=torch.int32, device=DEVICE)
    calls = -(-len(a) // rows)
    for number in range(max(calls, 2)):
        part = slice(number * rows, (number + 1) * rows) if number < calls else slice(rows)
        made: dict[str, Any] = {"begins": "zero", "ends": "never"}
        if number:
            made = {"begins": "sums", "ends": "rows or second"}
        product = sum_product(a[part].t(), b[part], high, plane, tiles, rows="K", beside=beside, **made)
        product(count, number * rows, 0)
    return high


@settings(max_examples=15)
@given(
    sizes=st.tuples(st.integers(1, 90), st.integers(1, 110), st.integers(1, 40)),
    calls=st.integers(1, 4),
    left_out=st.integers(0, 160),
    beside=st.builds(Rounds, st.sampled_from((16, 64)), st.integers(0, 10), st.integers(0, 2**21)),
    tiles=cuts(),
)
def test_sums_over_calls_are_rounded_once(
    sizes: tuple[int, int, int], calls: int, left_out: int, beside: Rounds, tiles: Tiles
) -> None:
    m, n, k = sizes
    a, b = matrix(calls * k, m, transposed=False, seed=2), matrix(calls * k, n, transposed=False, seed=3)
    live = max(calls * k - left_out, 0)
    a[live:], b[live:] = 0, 0  # as the kernels before leave them
    made = summed_over_calls(a, b, live, k, tiles, beside)
    exact = a.cpu().double().t() @ b.cpu().double()
    error = (made.cpu().double() - exact).abs()
    assert (error <= exact.abs() * 1.01 * 2.0**-8 + exact.abs().amax() * calls * 2.0**-12).all()


@settings(max_examples=15)
@given(
    sizes=st.tuples(st.integers(1, 90), st.integers(1, 110), st.integers(1, 40)),
    calls=st.integers(1, 4),
    left_out=st.integers(0, 160),
    tiles=cuts(),
)
def test_sums_that_begin_with_what_is_there(
    sizes: tuple[int, int, int], calls: int, left_out: int, tiles: Tiles
) -> None:
    """b has all rows, and each call says where its own begin."""
    m, n, k = sizes
    a, b = matrix(calls * k, m, transposed=False, seed=2), matrix(calls * k, n, transposed=False, seed=3)
    live = max(calls * k - left_out, 0)
    a[live:] = 0
    high = matrix(m, n, transposed=False, seed=4)
    exact = a.cpu().double().t() @ b.cpu().double() + high.cpu().double()
    plane = new_plane(high, tiles)
    count = torch.tensor(live, dtype=torch.int32, device=DEVICE)
    for start in range(0, calls * k, k):
        begins: Any = "sums" if start else "rounded"
        product = sum_product(a[start : start + k].t(), b, high, plane, tiles, rows="K", begins=begins, ends="rows")
        product(count, start, start)
    error = (high.cpu().double() - exact).abs()
    assert (error <= exact.abs() * 1.01 * 2.0**-8 + exact.abs().amax() * calls * 2.0**-12).all()


@settings(max_examples=15)
@given(
    rows=st.integers(1, 60),
    sizes=st.tuples(st.integers(1, 110), st.integers(1, 40)),
    calls=st.integers(1, 4),
    left_out=st.integers(0, 80),
    tiles=cuts(),
)
def test_sums_of_rows_over_calls(rows: int, sizes: tuple[int, int], calls: int, left_out: int, tiles: Tiles) -> None:
    """A call adds a part of the inner dimension to some of the rows, in whole tiles."""
    n, k = sizes
    high = matrix(rows, n, transposed=False, seed=4)
    a, b = matrix(rows, calls * k, transposed=False, seed=2), matrix(calls * k, n, transposed=False, seed=3)
    live = max(rows - left_out, 0)
    exact = a.cpu().double() @ b.cpu().double() + high.cpu().double()
    plane = new_plane(high, tiles)
    count = torch.tensor(live, dtype=torch.int32, device=DEVICE)
    for call in range(calls):
        inner = slice(call * k, (call + 1) * k)
        made: dict[str, Any] = {
            "begins": "sums" if call else "rounded",
            "ends": "always" if call == calls - 1 else "never",
        }
        for start in range(0, rows, 2 * tiles.m):
            part = a[start : start + 2 * tiles.m, inner]
            padded = torch.zeros(len(part), -(-k // 8) * 8, dtype=part.dtype, device=DEVICE)[:, :k].copy_(part)
            sum_product(padded, b[inner], high, plane, tiles, rows="M", **made)(count, start)
    error = (high.cpu().double() - exact)[:live].abs()
    bound = exact[:live].abs() * 1.01 * 2.0**-8 + exact.abs().amax() * calls * 2.0**-12
    assert (error <= bound).all()


def test_sums_over_many_calls_have_no_bias() -> None:
    calls, rows = 96, 16
    a, b = (matrix(calls * rows, 32, transposed=False, seed=seed).abs() for seed in (2, 3))
    made = summed_over_calls(a, b, calls * rows, rows, HOPPER if DEVICE == "cuda" else INTERPRETED)
    exact = a.cpu().double().t() @ b.cpu().double()
    # Cutting off instead of rounding would take off up to 2^-12 a call.
    assert ((made.cpu().double() - exact) / exact).mean().abs() < 3e-4


def test_a_layout_without_descriptor_is_refused() -> None:
    odd = torch.zeros(4, 7, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(UnsupportedError, match="multiples of 16 bytes"):
        Product("linear_cross_entropy_hidden", odd, odd.t(), [], tiles=HOPPER)


def test_rows_are_chosen_to_fill_the_device() -> None:
    counts = full_row_counts(2048, 132, 5000, HOPPER)
    assert 2048 in counts
    assert max(counts) <= 5000
    for rows in counts:
        assert max(busy(rows, 2048, split, 132, HOPPER) for split in (1, 2)) > 0.9
    assert best_split(2048, 2048, 132, HOPPER) == 2  # 128 tiles
    assert best_split(3072, 2048, 132, HOPPER) == 2  # 192, which take two rounds, half of the second idle
    assert best_split(4096, 2048, 132, HOPPER) == 1  # 256, which fill two rounds


def test_importing_the_launcher_does_not_import_triton() -> None:
    code = "import sys, structfly.lowering.linear_cross_entropy.exponentials; sys.exit('triton' in sys.modules)"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0

"""Ranges of tokens: how many, and their sums."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structfly.lowering.block_products.ranges import add_ranges, ranges, rounds
from tests.lowering.block_products.test_products import DEVICE, DTYPES


@settings(max_examples=20, deadline=None)
@given(
    counts=st.lists(st.sampled_from((0, 8, 1000, 1032, 3000)), min_size=1, max_size=3),
    split=st.integers(1, 4),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 100),
)
def test_ranges_are_added_in_order_and_rounded_once(
    counts: list[int], split: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    sums = torch.randn(split, sum(counts), generator=generator).to(DEVICE)
    results = [torch.full((count // 8, 8), float("nan"), dtype=dtype, device=DEVICE) for count in counts]
    add_ranges(sums, results)
    total = sums[0].clone()
    for other in sums[1:]:
        total += other
    for mine, expected in zip(results, total.to(dtype).split(counts), strict=True):
        assert torch.equal(mine.flatten(), expected)


@given(
    tiles=st.integers(1, 2000),
    tokens=st.integers(1, 2**17),
    programs=st.integers(1, 600),
    fit=st.integers(0, 8) | st.none(),
)
def test_ranges_take_no_longer_than_whole_sums(tiles: int, tokens: int, programs: int, fit: int | None) -> None:
    split = ranges(tiles, tokens, 64, programs, 2, fit)
    assert 1 <= split <= min(-(-tokens // 64), tokens if fit is None else max(fit, 1))
    assert rounds(split, tiles, tokens, programs) <= rounds(1, tiles, tokens, programs)


@pytest.mark.parametrize(
    ("tiles", "tokens", "programs", "expected"),
    [
        (132, 16384, 132, 1),  # every program has a tile
        (33, 16384, 132, 4),  # and with ranges, too
        (176, 16384, 132, 3),  # 4 rounds of a third rather than 2
        (33, 64, 132, 1),  # nothing to cut
    ],
)
def test_tokens_are_cut_where_programs_had_waited(tiles: int, tokens: int, programs: int, expected: int) -> None:
    assert ranges(tiles, tokens, 64, programs) == expected
    assert ranges(tiles, tokens, 64, programs, 2, expected) == expected

"""Tiles shared out among programs: each is made once, and no program is busy for much longer than the others."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from structfly.lowering.block_products.turns import _EPILOGUE, turns


def taken(table: list[int], programs: int) -> list[list[int]]:
    """The tiles of each program."""
    begins = table[: programs + 1]
    return [table[begin:end] for begin, end in pairwise(begins)]


@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    tall=st.integers(1, 12),
    across=st.integers(1, 3),
    steps=st.integers(1, 4),
    more=st.integers(0, 2),
    group=st.integers(1, 5),
    programs=st.integers(1, 9),
)
def test_every_tile_is_made_once_and_no_program_has_much_more_to_do(
    counts: list[int], tall: int, across: int, steps: int, more: int, group: int, programs: int
) -> None:
    tiles = tall * across * len(counts)
    programs = min(programs, tiles)
    starts = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    table = turns(starts, tall, across, steps, more, group, programs)
    assert table.dtype == torch.int32
    by_program = taken(table.tolist(), programs)
    assert all(by_program)
    assert sorted(number for each in by_program for number in each) == list(range(tiles))

    def work(number: int) -> int:  # as templates/gemm.jinja finds what a tile is of
        across_all = across * len(counts)
        first = number // (group * across_all)
        height = min(tall - first * group, group)
        part = number % (group * across_all) // height // across
        return counts[part] * steps + more + _EPILOGUE

    loads = [sum(map(work, each)) for each in by_program]
    longest = max(map(work, range(tiles)))
    assert max(loads) <= sum(loads) / programs + longest * (1 - 1 / programs)  # Graham's bound


def test_programs_that_run_at_one_time_share_operands_until_the_end_is_evened_out() -> None:
    starts = torch.tensor([0, 1, 5, 9], dtype=torch.int32)
    by_program = taken(turns(starts, 32, 1, 2, 0, 4, 4).tolist(), 4)
    firsts = [each[:-3] for each in by_program]
    assert all(each == sorted(each) for each in firsts)
    plain = torch.tensor([sum(each) for each in by_program])
    assert plain.max() - plain.min() < 0.1 * plain.sum()


def test_the_longest_tiles_of_the_end_come_first() -> None:
    starts = torch.tensor([0, 1, 2, 3, 9], dtype=torch.int32)
    assert taken(turns(starts, 1, 1, 10, 0, 1, 2).tolist(), 2) == [[3], [0, 1, 2]]

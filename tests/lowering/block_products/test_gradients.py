"""Gradients of blocks and of a product of low rank beside them, interpreted on a CPU: ragged sides, any tiles."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structfly.lowering.block_products import gradients
from structfly.lowering.block_products.gradient_places import (
    BLOCK,
    LEFT,
    RIGHT,
    Cutting,
    Gradients,
    columns_of_rows,
    count_tiles,
    gradient_places,
)
from structfly.lowering.block_products.gradients import LowRankGradients, block_gradients
from structfly.lowering.block_products.ranges import ranges
from structfly.lowering.block_products.tiles import GRADIENTS
from structfly.lowering.gemm import Tiles
from tests.lowering.block_products.test_products import (
    DEVICE,
    DTYPES,
    SIDES,
    cuts,
    random,
    roundings,
    with_tokens_along,
)
from tests.oracle import assert_as_accurate

SEVERAL = (  # sums that a program has side by side
    Cutting(Tiles(m=128, n=128, k=64, group=8, parts=2, warps=8, stages=4), 2),
    Cutting(Tiles(m=64, n=64, k=64, group=8, parts=1, warps=4, stages=3, resident=2), 3),
    Cutting(Tiles(m=64, n=64, k=32, group=8, parts=1, warps=4, stages=4, resident=2), 5),
)
RANKS = st.sampled_from((8, 24, 40))


@st.composite
def shapes(draw: st.DrawFn, ranks: st.SearchStrategy[int] = RANKS) -> Gradients:
    parts = st.integers(1, 3)
    return Gradients(draw(parts), draw(parts), draw(SIDES), draw(SIDES), draw(ranks))


def drawn_places(shape: Gradients, blocks: int, seed: int) -> tuple[Tensor, Tensor]:
    """The parts of a and b of so many blocks, in any order, some perhaps twice."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randint(count, (blocks,), generator=generator) for count in shape[:2])
    return rows.to(DEVICE, torch.int32), columns.to(DEVICE, torch.int32)


def check(
    tokens: int,
    shape: Gradients,
    blocks: int,
    turned: bool,
    cutting: Cutting,
    split: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """All that is made is as accurate as eager."""
    rows, columns = drawn_places(shape, blocks, seed)
    a, b = random(dtype, 0, tokens, shape.rows, shape.side_m), random(dtype, 1, tokens, shape.columns, shape.side_n)
    dz, z = random(dtype, 2, tokens, shape.rank), random(dtype, 3, tokens, shape.rank)

    def unwritten(*sides: int) -> Tensor:
        return torch.full(sides, float("nan"), dtype=dtype, device=DEVICE)

    c = unwritten(blocks, shape.side_m, shape.side_n)
    left, right = unwritten(shape.rows * shape.side_m, shape.rank), unwritten(shape.rank, shape.columns * shape.side_n)
    seen_z = with_tokens_along(z[:, None])[0] if turned else z
    beside = LowRankGradients(dz, seen_z, left, right) if shape.rank else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradients, "ranges", lambda *_: split)
        places = gradient_places(rows, columns, shape, cutting)
        block_gradients(a, with_tokens_along(b) if turned else b, c, places, b_turned=turned, beside=beside)

    def reference(wide: torch.dtype) -> list[Tensor]:
        pairs = zip(rows.tolist(), columns.tolist(), strict=True)
        products = [a[:, row].to(wide).t() @ b[:, column].to(wide) for row, column in pairs]
        made = [torch.stack(products) if products else c.to(wide)]
        if shape.rank:
            made += [a.flatten(1).to(wide).t() @ z.to(wide), dz.to(wide).t() @ b.flatten(1).to(wide)]
        return made

    expected = zip(reference(torch.float32), reference(torch.float64), strict=True)
    for mine, (single, exact), what in zip((c, left, right), expected, ("blocks", "left", "right"), strict=False):
        assert_as_accurate(mine, single.to(dtype), exact, dtype, what, roundings(dtype))


@settings(max_examples=20, deadline=None)
@given(
    tokens=st.integers(0, 50),
    shape=shapes(st.sampled_from((0, 8, 24, 40))),
    blocks=st.integers(0, 5),
    turned=st.booleans(),
    abreast=st.integers(1, 3),
    split=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    tiles=cuts(),
    spans=st.booleans(),
    seed=st.integers(0, 100),
)
def test_gradients_are_as_accurate_as_eager(
    tokens: int,
    shape: Gradients,
    blocks: int,
    turned: bool,
    abreast: int,
    split: int,
    dtype: torch.dtype,
    tiles: Tiles,
    spans: bool,
    seed: int,
) -> None:
    cutting = Cutting(tiles, abreast, spans)
    if cutting.why_not(shape._replace(itemsize=dtype.itemsize)):
        cutting = Cutting(tiles, abreast)
    check(tokens, shape, blocks, turned, cutting, split, dtype, seed)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize(("abreast", "rank"), [(1, 0), (2, 40), (3, 24)])
def test_boxes_that_span_parts(turned: bool, split: int, abreast: int, rank: int) -> None:
    tiles = Tiles(64, 64, 32, 2, 2, 4, 2) if DEVICE == "cuda" else Tiles(16, 32, 16, 2, 2, 1, 1)
    check(
        45,
        Gradients(2, 4, 24, 96 if DEVICE == "cuda" else 48, rank),
        5,
        turned,
        Cutting(tiles, abreast, spans=True),
        split,
        torch.bfloat16,
        3,
    )


@settings(deadline=None)
@given(
    shape=shapes(st.sampled_from((0, 8, 24, 40))),
    blocks=st.integers(0, 9),
    abreast=st.integers(1, 4),
    tiles=cuts(),
    seed=st.integers(0, 100),
)
def test_every_entry_is_listed_once_and_as_many_tiles_are_counted(
    shape: Gradients, blocks: int, abreast: int, tiles: Tiles, seed: int
) -> None:
    rows, columns = drawn_places(shape, blocks, seed)
    listed = gradient_places(rows, columns, shape, Cutting(tiles, abreast)).listed.tolist()
    of_rows = columns_of_rows(rows, columns, shape.rows)
    assert count_tiles(of_rows, shape, Cutting(tiles, abreast)) == len(listed)
    made = [(*numbers[:2], *numbers[first : first + 4]) for numbers in listed for first in range(2, 2 + 4 * abreast, 4)]
    kept = list(enumerate(zip(rows.tolist(), columns.tolist(), strict=True)))
    m, n = range(0, shape.side_m, tiles.m), range(0, shape.side_n, tiles.n)
    expected = [(row, m0, BLOCK, column, n0, member) for member, (row, column) in kept for m0 in m for n0 in n]
    expected += [
        (row, m0, LEFT, 0, n0, row) for row in range(shape.rows) for m0 in m for n0 in range(0, shape.rank, tiles.n)
    ]
    expected += [
        (0, m0, RIGHT, column, n0, column)
        for column in range(shape.columns)
        for m0 in range(0, shape.rank, tiles.m)
        for n0 in n
    ]
    inside = [each for each in made if each[5] < blocks or each[2] != BLOCK]
    assert sorted(inside) == sorted(expected)
    assert all(column == shape.columns for _, _, whose, column, _, member in made if (whose, member) == (BLOCK, blocks))


@settings(deadline=None)
@given(
    shape=shapes(st.sampled_from((0, 8, 24, 40))).map(lambda shape: shape._replace(side_n=2 * shape.side_n)),
    blocks=st.integers(0, 9),
    abreast=st.integers(1, 4),
    m=st.sampled_from((16, 32)),
    seed=st.integers(0, 100),
)
def test_every_column_is_in_one_half_of_a_spanning_box(
    shape: Gradients, blocks: int, abreast: int, m: int, seed: int
) -> None:
    tiles = Tiles(m, 32, 16, 2, 2, 1, 1)
    cutting = Cutting(tiles, abreast, spans=True)
    assert not cutting.why_not(shape)
    rows, columns = drawn_places(shape, blocks, seed)
    listed = gradient_places(rows, columns, shape, cutting).listed.tolist()
    of_rows = columns_of_rows(rows, columns, shape.rows)
    assert count_tiles(of_rows, shape, cutting) == len(listed)
    half = tiles.n // 2
    made = []
    for row, m0, *products in listed:
        for whose, at, *halves in (products[first : first + 6] for first in range(0, len(products), 6)):
            side = shape.rank if whose == LEFT else shape.side_n
            for number, (member, n0) in enumerate((halves[:2], halves[2:])):
                if n0 < side and (whose, member) != (BLOCK, blocks):
                    made.append((row, m0, whose, at + number * half, member, n0))
    n, ranks = range(0, shape.side_n, half), range(0, shape.rank, half)
    expected = [
        (row, m0, BLOCK, column * shape.side_n + n0, member, n0)
        for row, of_row in enumerate(of_rows)
        for column, member in of_row
        for m0 in range(0, shape.side_m, tiles.m)
        for n0 in n
    ]
    expected += [
        (row, m0, LEFT, n0, row, n0)
        for row in range(shape.rows)
        for m0 in range(0, shape.side_m, tiles.m)
        for n0 in ranks
    ]
    expected += [
        (0, m0, RIGHT, column * shape.side_n + n0, column, n0)
        for column in range(shape.columns)
        for m0 in range(0, shape.rank, tiles.m)
        for n0 in n
    ]
    assert sorted(made) == sorted(expected)


def test_parts_that_lie_side_by_side_share_boxes() -> None:
    """Two of three of 96 columns are three boxes of 64, and the third alone is two."""
    shape, cutting = Gradients(1, 4, 128, 96), Cutting(Tiles(128, 64, 64, 8, 2, 4, 2), 1, spans=True)
    assert count_tiles([[(0, 0), (1, 1), (3, 2)]], shape, cutting) == 5
    assert count_tiles([[(0, 0), (2, 1)]], shape, cutting) == 4
    assert count_tiles([[(0, 0), (1, 1), (3, 2)]], shape, cutting._replace(spans=False)) == 6


def test_the_same_bits_every_time() -> None:
    shape = Gradients(2, 2, 24, 24, 8)
    rows, columns = drawn_places(shape, 3, 0)
    a, b, thin = (
        random(torch.bfloat16, 0, 70, 2, 24),
        random(torch.bfloat16, 1, 70, 2, 24),
        random(torch.bfloat16, 2, 70, 8),
    )
    made = []
    for _ in range(2):
        c = torch.empty(3, 24, 24, dtype=torch.bfloat16, device=DEVICE)
        beside = LowRankGradients(thin, thin, a.new_empty(48, 8), a.new_empty(8, 48))
        block_gradients(a, b, c, gradients.placed(rows, columns, shape, 70), beside=beside)
        made.append((c, beside.left, beside.right))
    assert all(torch.equal(*each) for each in zip(*made, strict=True))


def test_sums_of_ranges_lie_in_room_that_is_large_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "ranges", lambda *_: 3)
    shape = Gradients(2, 2, 24, 16)
    rows, columns = drawn_places(shape, 3, 0)
    a, b = random(torch.bfloat16, 0, 70, 2, 24), random(torch.bfloat16, 1, 70, 2, 16)
    enough = 2 * 3 * 3 * 24 * 16  # numbers of 16 bits as large as those of float32
    made = []
    for size in (0, enough - 1, enough, enough + 100):
        room = torch.full((size,), 7.0, dtype=torch.bfloat16, device=DEVICE)
        c = torch.empty(3, 24, 16, dtype=torch.bfloat16, device=DEVICE)
        block_gradients(a, b, c, gradients.placed(rows, columns, shape, 70), room=room)
        made.append(c)
        assert bool((room == 7).all()) == (size < enough)
        assert (room[enough:] == 7).all()
    assert all(torch.equal(made[0], each) for each in made[1:])


@pytest.mark.parametrize(
    ("room", "spare", "expected"), [(None, None, 4), (2, None, 4), (2, 0, 2), (0, 3, 3), (3, 2, 3), (1, 0, 1)]
)
def test_there_are_as_many_ranges_as_fit(
    room: int | None, spare: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "programs_on", lambda *_: 8 * 4)
    found: list[int] = []
    monkeypatch.setattr(gradients, "add_ranges", lambda sums, _: found.append(len(sums)))
    shape = Gradients(2, 2, 16, 16)
    rows, columns = (torch.tensor(each, dtype=torch.int32, device=DEVICE) for each in ((0, 0, 1, 1), (0, 1, 0, 1)))
    a = random(torch.bfloat16, 0, 4000, 2, 16)
    c = torch.empty(4, 16, 16, dtype=torch.bfloat16, device=DEVICE)
    each = 4 * c.numel()  # bytes of a range
    places = gradient_places(rows, columns, shape, Cutting(Tiles(16, 16, 16, 2, 1, 1, 1)))
    memory = None if room is None else torch.empty(room * each, dtype=torch.uint8, device=DEVICE)
    for _ in range(2):
        misses = ranges.cache_info().misses
        block_gradients(a, a, c, places, room=memory, spare=None if spare is None else spare * each)
    assert [*found, 1][0] == expected
    assert ranges.cache_info().misses == misses  # a call like one before finds what that found


@pytest.mark.gpu
@pytest.mark.parametrize("cutting", [*(cut.cutting for cut in GRADIENTS), *SEVERAL], ids=str)
@pytest.mark.parametrize("split", [1, 3])
def test_every_cut_on_a_gpu_is_as_accurate_as_eager(
    cutting: Cutting, split: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "ranges", lambda *_: split)
    shape, tokens, dtype = Gradients(3, 3, 384, 96, 72), 1000, torch.bfloat16
    rows, columns = drawn_places(shape, 7, 0)
    a, b = random(dtype, 0, tokens, 3, shape.side_m), random(dtype, 1, tokens, 3, shape.side_n)
    dz, z = random(dtype, 2, tokens, shape.rank), random(dtype, 3, tokens, shape.rank)
    c = torch.full((7, shape.side_m, shape.side_n), float("nan"), dtype=dtype, device=DEVICE)
    beside = LowRankGradients(
        dz, z, a.new_empty(3 * shape.side_m, shape.rank), a.new_empty(shape.rank, 3 * shape.side_n)
    )
    block_gradients(a, b, c, gradient_places(rows, columns, shape, cutting), beside=beside)
    pairs = list(zip(rows.tolist(), columns.tolist(), strict=True))

    def reference(wide: torch.dtype) -> tuple[Tensor, ...]:
        of_blocks = torch.stack([a[:, row].to(wide).t() @ b[:, column].to(wide) for row, column in pairs])
        return of_blocks, a.flatten(1).to(wide).t() @ z.to(wide), dz.to(wide).t() @ b.flatten(1).to(wide)

    made = zip((c, beside.left, beside.right), reference(torch.float32), reference(torch.float64), strict=True)
    for mine, single, exact in made:
        assert_as_accurate(mine, single.to(dtype), exact, dtype, "gradients")

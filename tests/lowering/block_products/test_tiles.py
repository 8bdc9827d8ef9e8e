"""The choice of tiles, against what was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.block_products import CASES, TILE, TILES, intervals, name_of
from structfly.lowering.block_products import matrix_tiles, tiles
from structfly.lowering.block_products.gradient_places import Gradients, columns_of_rows
from structfly.lowering.block_products.gradients import about
from structfly.lowering.block_products.tiles import Cut
from structfly.lowering.gemm import Tiles
from structfly.records import DeviceModel

RESULT = Path(__file__).parents[3] / "benchmarks" / "results" / "block_products_h100.json"
PROCESSORS = 132
MOST = 1.1  # times the fastest that was measured


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tiles, "device_model", lambda _: DeviceModel("NVIDIA H100 80GB HBM3", (9, 0)))
    monkeypatch.setattr(tiles, "processors_of", lambda _: PROCESSORS)
    monkeypatch.setattr(tiles, "programs_on", lambda _, cut: PROCESSORS * cut.resident)
    tiles._sum_cut.cache_clear()
    yield
    tiles._sum_cut.cache_clear()


def chosen(name: str, tokens: int, inside: int, out: int, grid: int, factors: int, rank: int) -> Cut:
    side_k, side_n = inside // grid, out // grid
    if name == "sums":
        return of_sums(tokens, grid, side_n, side_k)
    if name == "sums turned":
        return of_sums(tokens, grid, side_k, side_n, turned=True)
    shape = Gradients(grid, grid, side_n, side_k, rank if "low rank" in name else 0)
    kept = [[(row if f < 0 else row ^ (1 << f), 0) for f in range(-1, factors)] for row in range(grid)]
    return tiles.gradient_cut(torch.device("cuda"), about(tokens), kept, shape)


def of_sums(tokens: int, parts: int, side_n: int, side_k: int, *, turned: bool = False, even: bool = True) -> Cut:
    made = tiles._sum_cut(torch.device("cuda"), 2, tokens, parts, side_n, side_k, turned, even)
    return next(cut for cut in tiles.sum_cuts(side_k) if cut.summing == made)


ALL = {
    *(cut.tiles for cut in (*tiles.SUMS, *tiles.SHORT_SUMS, *tiles.GRADIENTS)),
    *(matrix_tiles.PRODUCTS, matrix_tiles.FEW_TOKENS, *matrix_tiles.GRADIENTS),
}


@pytest.mark.parametrize("cut", sorted(ALL, key=str), ids=str)
def test_tiles_of_wider_numbers_are_of_as_many_bytes(cut: Tiles) -> None:
    wide = cut.for_itemsize(4)
    assert cut.for_itemsize(2) == cut
    assert (wide.m, wide.n, wide.k * 4, wide.part * 4) == (cut.m, cut.n, cut.k * 2, cut.part * 2)
    assert replace(wide, k=cut.k, parts=cut.parts) == cut


@pytest.mark.usefixtures("h100")
@pytest.mark.parametrize(("side_k", "itemsize", "step"), [(96, 2, 32), (128, 2, 64), (96, 4, 32), (48, 4, 16)])
def test_steps_leave_as_little_empty_of_wider_numbers(side_k: int, itemsize: int, step: int) -> None:
    made = tiles._sum_cut(torch.device("cuda"), itemsize, 16384, 16, 256, side_k, turned=False, even=True)
    assert made.tiles.k == step


@pytest.mark.usefixtures("h100")
@pytest.mark.parametrize("side_k", [64, 96])
def test_sums_of_wider_numbers_are_not_swapped(side_k: int) -> None:
    two, four = (
        tiles._sum_cut(torch.device("cuda"), itemsize, 32768, 8, 128, side_k, turned=True, even=True)
        for itemsize in (2, 4)
    )
    assert two.swapped
    assert not four.swapped


@pytest.mark.usefixtures("h100")
def test_no_round_of_tiles_is_waited_for_where_they_are_shared_out() -> None:
    """13 x 64 tiles of 256 x 128 are 6.3 rounds, 13 x 128 of 128 x 128, two on a processor, 12.6 half ones."""
    even, uneven = (of_sums(16384, 13, 128, 128, turned=True, even=each) for each in (True, False))
    assert (even.tiles.m, uneven.tiles.m) == (128, 256)


@pytest.mark.usefixtures("h100")
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("tokens", [100, 16384])
def test_gradients_are_cut_for_their_numbers(tokens: int, itemsize: int) -> None:
    made = Gradients(16, 16, 256, 256, itemsize=itemsize)
    blocks = [[(column, 0) for column in range(4)]] * 16
    cut = tiles.gradient_cut(torch.device("cuda"), tokens, blocks, made)
    assert cut.tiles in [each.tiles.for_itemsize(itemsize) for each in tiles.GRADIENTS]


@given(st.integers(1, 1 << 40))
def test_tiles_are_placed_for_about_as_many_tokens(tokens: int) -> None:
    assert 2**-0.5 <= about(tokens) / tokens <= 2**0.5
    assert about(about(tokens)) == about(tokens)


@pytest.mark.usefixtures("h100")
@pytest.mark.parametrize("name", ["sums", "sums turned", "gradients", "gradients with low rank"])
@pytest.mark.parametrize("case", [case for case in CASES if case[0] >= 16384])
def test_no_product_of_blocks_takes_much_longer_than_in_the_best_tiles(case: tuple[int, ...], name: str) -> None:
    tokens, inside, out, grid, factors, rank = case
    mode = f"{name} {tokens}x{inside}x{out} bfloat16, blocks {inside // grid}x{out // grid}"
    check(mode, chosen(name, tokens, inside, out, grid, factors, rank))


@pytest.mark.usefixtures("h100")
@pytest.mark.parametrize("name", ["components", "features", "gradients"])
@pytest.mark.parametrize("case", TILES)
def test_no_product_of_tiles_takes_much_longer_than_in_the_best_ones(case: tuple[Any, ...], name: str) -> None:
    tokens, features, groups, share = case
    index, places = intervals(features // TILE, groups, share), features // TILE
    mode = f"{name} {tokens}x{features}x{groups * TILE} bfloat16, {index.shape[1]} tiles {TILE}x{TILE}"
    if name == "gradients":
        blocks = columns_of_rows(index[1], index[0], places)
        cut = tiles.gradient_cut(torch.device("cuda"), about(tokens), blocks, Gradients(places, groups, TILE, TILE))
    else:
        turned = name == "components"
        cut = of_sums(tokens, groups if turned else places, TILE, TILE, turned=turned)
    check(mode, cut)


def check(mode: str, cut: Cut) -> None:
    rows = [row for row in json.loads(RESULT.read_text())["rows"] if row["mode"] == mode]
    times = {row["provider"]: row["p50"] for row in rows if row["provider"] != "torch.mm"}
    assert times[name_of(cut)] <= MOST * min(times.values())

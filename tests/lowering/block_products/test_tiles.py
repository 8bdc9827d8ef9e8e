"""The choice of tiles, against what was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.block_products import CASES, name_of
from structfly.lowering.block_products import tiles
from structfly.lowering.block_products.gradient_places import Gradients
from structfly.lowering.block_products.tiles import Cut
from structfly.records import DeviceModel

RESULT = Path(__file__).parents[3] / "benchmarks" / "results" / "block_products_h100.json"
PROCESSORS = 132
MOST = 1.1  # times the fastest that was measured


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tiles, "device_model", lambda _: DeviceModel("NVIDIA H100 80GB HBM3", (9, 0)))
    monkeypatch.setattr(tiles, "processors_of", lambda _: PROCESSORS)
    monkeypatch.setattr(tiles, "programs_on", lambda _, cut: PROCESSORS * cut.resident)
    tiles._sum_tiles.cache_clear()
    yield
    tiles._sum_tiles.cache_clear()


def chosen(name: str, tokens: int, inside: int, out: int, grid: int, factors: int, rank: int) -> Cut:
    side_k, side_n = inside // grid, out // grid
    if name == "sums":
        made = tiles._sum_tiles(torch.device("cuda"), tokens, grid, side_n, side_k)
        return next(cut for cut in tiles.sum_cuts(side_k) if cut.tiles == made)
    shape = Gradients(grid, grid, side_n, side_k, rank if "low rank" in name else 0)
    return tiles.gradient_cut(torch.device("cuda"), tokens, [1 + factors] * grid, shape)


@pytest.mark.usefixtures("h100")
@pytest.mark.parametrize("name", ["sums", "gradients", "gradients with low rank"])
@pytest.mark.parametrize("case", [case for case in CASES if case[0] >= 16384])
def test_no_product_takes_much_longer_than_in_the_best_tiles(case: tuple[int, ...], name: str) -> None:
    tokens, inside, out, grid, factors, rank = case
    mode = f"{name} {tokens}x{inside}x{out} bfloat16, blocks {inside // grid}x{out // grid}"
    rows = [row for row in json.loads(RESULT.read_text())["rows"] if row["mode"] == mode]
    times = {row["provider"]: row["p50"] for row in rows if row["provider"] != "torch.mm"}
    cut = chosen(name, tokens, inside, out, grid, factors, rank)
    assert times[name_of(cut)] <= MOST * min(times.values())

"""The search for tiles, with a stand-in for the device's clock."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from structfly.errors import UnsupportedError
from structfly.lowering.gemm import Tiles
from structfly.lowering.tuning.choice import SAFE, shipped_tiles_for
from structfly.lowering.tuning.limits import why_not
from structfly.lowering.tuning.products import KINDS, ProductClass
from structfly.lowering.tuning.search import Search, search
from structfly.records import DeviceModel


def product(template: str = "linear_cross_entropy_hidden", capability: tuple[int, int] = (9, 0)) -> ProductClass:
    return ProductClass(DeviceModel("a GPU", capability), template, (), "bfloat16", "nn", None, 2048, None)


def run(seconds_of: Callable[[Tiles], float], found: ProductClass | None = None, *, seconds: float = 1e9) -> Search:
    found = found or product()
    return search(found, [shipped_tiles_for(found)], seconds_of, seconds=seconds)


@given(
    template=st.sampled_from(sorted(KINDS)),
    capability=st.sampled_from(((7, 5), (8, 0), (8, 9), (9, 0), (12, 0))),
    seed=st.integers(0, 2**16),
)
def test_only_what_is_supported_is_tried_once_and_the_fastest_is_chosen(
    template: str, capability: tuple[int, int], seed: int
) -> None:
    times: dict[Tiles, float] = {}
    random = Random(seed)

    def seconds_of(tiles: Tiles) -> float:
        assert tiles not in times
        assert not why_not(template, tiles, capability)
        times[tiles] = seconds = random.uniform(1.0, 10.0)
        return seconds

    found = run(seconds_of, product(template, capability))
    assert found.complete
    assert found.chosen is not None
    assert times[found.chosen] <= min(times.values()) * 1.02
    assert len(times) > 3


def test_each_property_is_searched_with_the_best_of_those_before() -> None:
    best = Tiles(m=64, n=256, k=32, group=16, parts=2, warps=4, stages=6)

    def seconds_of(tiles: Tiles) -> float:
        wrong: int = sum(getattr(tiles, name) != getattr(best, name) for name in best.__dataclass_fields__)
        return 1.0 + wrong

    assert run(seconds_of).chosen == best


def test_what_is_shipped_stays_unless_another_is_clearly_faster() -> None:
    shipped = shipped_tiles_for(product())
    assert run(lambda tiles: 1.0 if tiles == shipped else 0.995).chosen == shipped
    assert run(lambda tiles: 1.0 if tiles == shipped else 0.98).chosen != shipped


def test_the_time_is_bounded() -> None:
    now = 0.0

    def seconds_of(_: Tiles) -> float:
        nonlocal now
        now += 10.0
        return 1.0

    found = search(product(), [SAFE], seconds_of, seconds=35.0, clock=lambda: now)
    assert len(found.trials) == 4  # the last begins at 30 seconds
    assert not found.complete
    assert len(search(product(), [SAFE], seconds_of, seconds=0.0, clock=lambda: now).trials) == 1


def test_tiles_that_cannot_run_are_noted() -> None:
    shipped = shipped_tiles_for(product())

    def seconds_of(tiles: Tiles) -> float:
        if tiles.warps == shipped.warps:
            raise UnsupportedError("out of registers")
        return 1.0

    found = run(seconds_of)
    assert found.trials[0].problem == "out of registers"
    assert found.chosen is not None
    assert found.chosen.warps != shipped.warps
    assert run(refuse).chosen is None


def refuse(_: Tiles) -> float:
    raise UnsupportedError("no")


def test_other_errors_are_not_hidden() -> None:
    def fail(_: Tiles) -> float:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(fail)


def test_what_else_is_to_be_tried_comes_second() -> None:
    shipped = shipped_tiles_for(product())
    tuned = replace(shipped, group=7)
    found = search(product(), [shipped, tuned], lambda _: math.inf, seconds=1e9)
    assert [trial.tiles for trial in found.trials[:2]] == [shipped, tuned]

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
from structfly.lowering.gemm import TORCH_MM, Cut, Tiles
from structfly.lowering.tuning.choice import SAFE, shipped_tiles_for
from structfly.lowering.tuning.limits import why_not
from structfly.lowering.tuning.products import KINDS, ProductClass
from structfly.lowering.tuning.search import Search, search
from structfly.records import DeviceModel


def product(template: str = "linear_cross_entropy_hidden", capability: tuple[int, int] = (9, 0)) -> ProductClass:
    return ProductClass(DeviceModel("a GPU", capability), template, (), "bfloat16", "nn", None, 2048, None)


def run(seconds_of: Callable[[Cut], float], found: ProductClass | None = None, *, seconds: float = 1e9) -> Search:
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
    times: dict[Cut, float] = {}
    random = Random(seed)

    def seconds_of(tiles: Cut) -> float:
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

    def seconds_of(tiles: Cut) -> float:
        wrong: int = sum(getattr(tiles, name) != getattr(best, name) for name in best.__dataclass_fields__)
        return 1.0 + wrong

    assert run(seconds_of).chosen == best


def test_what_is_shipped_stays_unless_another_is_clearly_faster() -> None:
    shipped = shipped_tiles_for(product())
    assert run(lambda tiles: 1.0 if tiles == shipped else 0.995).chosen == shipped
    assert run(lambda tiles: 1.0 if tiles == shipped else 0.98).chosen != shipped


def test_the_time_is_bounded() -> None:
    now = 0.0

    def seconds_of(_: Cut) -> float:
        nonlocal now
        now += 10.0
        return 1.0

    found = search(product(), [SAFE], seconds_of, seconds=35.0, clock=lambda: now)
    assert len(found.trials) == 4  # the last begins at 30 seconds
    assert not found.complete
    assert len(search(product(), [SAFE], seconds_of, seconds=0.0, clock=lambda: now).trials) == 1


def test_tiles_that_cannot_run_are_noted() -> None:
    def seconds_of(tiles: Cut) -> float:
        if isinstance(tiles, Tiles) and tiles.warps == 8:
            raise UnsupportedError("out of registers")
        return 1.0

    found = run(seconds_of)
    assert found.trials[0].problem == "out of registers"
    assert isinstance(found.chosen, Tiles)
    assert found.chosen.warps != 8
    assert run(refuse).chosen is None


def refuse(_: Cut) -> float:
    raise UnsupportedError("no")


def test_other_errors_are_not_hidden() -> None:
    def fail(_: Cut) -> float:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(fail)


def test_what_else_is_to_be_tried_comes_second() -> None:
    tuned = replace(SAFE, group=7)
    found = search(product(), [SAFE, tuned], lambda _: math.inf, seconds=1e9)
    assert [trial.cut for trial in found.trials[:2]] == [SAFE, tuned]


@pytest.mark.parametrize("library", [0.5, 1.5, 0.995])
def test_torch_is_tried_where_it_is_to_be_and_tiles_are_searched_beside_it(library: float) -> None:
    best = replace(SAFE, m=128)

    def seconds_of(cut: Cut) -> float:
        return library if cut == TORCH_MM else 1.0 if cut == best else 1.2

    found = search(product(), [TORCH_MM, SAFE], seconds_of, seconds=1e9)
    assert best in [trial.cut for trial in found.trials]
    assert [trial.cut for trial in found.trials].count(TORCH_MM) == 1
    assert found.chosen == (TORCH_MM if library < 1 else best)

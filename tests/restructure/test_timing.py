"""Measured times of layers, what they say of others, and what is chosen by them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structfly import Budget, Plan, Survey, measure, restructure_, survey
from structfly.errors import PlanError, UnsupportedError
from structfly.lowering.device_profile import device_profile
from structfly.patterns.block_sparse import BlockSparse
from structfly.patterns.linear.candidates import Candidate
from structfly.patterns.low_rank import LowRank
from structfly.patterns.monarch import Monarch
from structfly.patterns.structure import Structure
from structfly.records.layer import LayerSizes
from structfly.restructure import surveying
from structfly.restructure.corrections import Corrections
from structfly.restructure.timing import LayerTime, Shape, Taken, measured_times
from structfly.rewriter.layer_costs import Conditions, dense_cost
from tests.restructure.models import make

CPU = torch.device("cpu")
CONDITIONS = Conditions(4096, device_profile(CPU))
SMALL, LARGE = (Shape(LayerSizes(*sizes), torch.float32) for sizes in ((128, 192), (256, 256)))


def predicted(structure: Structure | None, shape: Shape) -> float:
    sizes, dtype = shape
    cost = dense_cost(sizes, dtype) if structure is None else structure.cost(sizes, dtype)
    return CONDITIONS.amounts(cost)["time"]


def times(seconds: float = 1e9) -> list[tuple[Structure | None, Shape]]:
    """What is timed, in order."""
    count = itertools.count()
    offered: dict[Shape, list[type[Structure]]] = {SMALL: [LowRank, Monarch], LARGE: [LowRank, BlockSparse]}
    found = measured_times(
        offered,
        CONDITIONS,
        CPU,
        seconds=seconds,
        progress=False,
        timer=lambda *_: Taken(1.0, 1.0),
        clock=lambda: float(next(count)),
    )
    return [(each.structure, Shape(each.sizes, each.dtype)) for each in found]


def test_the_dense_layers_are_timed_then_settings_spread_over_the_menus() -> None:
    order = times()
    assert order[:2] == [(None, SMALL), (None, LARGE)]
    assert [(type(structure), shape) for structure, shape in order[2:6]] == [
        (LowRank, SMALL),
        (Monarch, SMALL),
        (LowRank, LARGE),
        (BlockSparse, LARGE),
    ]
    assert len(set(order)) == len(order) == 2 + 4 * 5
    for kind, shape in ((LowRank, SMALL), (Monarch, SMALL), (LowRank, LARGE), (BlockSparse, LARGE)):
        all_times = sorted(predicted(each, shape) for each in kind.menu(shape.sizes))
        mine = [predicted(each, there) for each, there in order if isinstance(each, kind) and there == shape]
        assert min(mine) == all_times[0]
        assert max(mine) == all_times[-1]
        assert mine[0] == pytest.approx(all_times[len(all_times) // 2], rel=0.1)


@pytest.mark.parametrize("seconds", [0.5, 1.5, 9.5])
def test_no_measurement_begins_after_the_time_that_is_allowed(seconds: float) -> None:
    """By a clock that is a second on whenever it is read, first before the first measurement."""
    assert times(seconds) == times()[: int(seconds)]


@settings(max_examples=5, deadline=None)
@given(drifts=st.lists(st.floats(0.1, 10.0), min_size=7, max_size=7))
def test_times_are_relative_to_the_dense_layer_in_the_same_rounds(drifts: list[float]) -> None:
    """On a device that was as fast as it likes."""
    drift = iter(drifts)

    def timer(structure: Structure | None, *_: object) -> Taken:
        dense = next(drift)
        return Taken(dense if structure is None else 3 * dense, dense)

    dense, *others = measured_times({SMALL: [Monarch]}, CONDITIONS, CPU, seconds=60, progress=False, timer=timer)
    assert dense.seconds == drifts[0]
    assert [each.seconds for each in others] == pytest.approx([3 * drifts[0]] * 5)


def measured(structure: Structure | None, shape: Shape, ratio: float) -> LayerTime:
    expected = predicted(structure, shape)
    return LayerTime(structure, *shape, CONDITIONS.tokens, "a device", expected, expected * ratio)


ratios = st.floats(0.01, 100.0)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_corrections_follow_the_nearest_that_was_measured(data: st.DataObject) -> None:
    menu = LowRank.menu(SMALL.sizes)
    some = data.draw(st.lists(st.sampled_from(menu), min_size=1, max_size=5, unique=True))
    known = {each: data.draw(ratios) for each in some}
    dense, elsewhere = data.draw(ratios), data.draw(ratios)
    other = Monarch.menu(LARGE.sizes)[0]
    corrections = Corrections(
        [
            measured(None, SMALL, dense),
            measured(other, LARGE, elsewhere),
            *(measured(each, SMALL, ratio) for each, ratio in known.items()),
        ]
    )

    def ratio_of(structure: Structure | None, shape: Shape) -> tuple[float, str]:
        expected = predicted(structure, shape)
        return corrections.of(shape, structure, expected) / expected, corrections.source(shape, structure)

    by_time = {predicted(each, SMALL): each for each in menu}
    assert len(by_time) == len(menu)
    order = [by_time[time] for time in sorted(by_time)]
    for place, each in enumerate(order):
        ratio, source = ratio_of(each, SMALL)
        if each in known:
            assert ratio == pytest.approx(known[each])
            assert source == "measured"
            continue
        before = [known[found] for found in order[:place] if found in known][-1:]
        after = [known[found] for found in order[place:] if found in known][:1]
        assert source == "corrected"
        assert min(before + after) * (1 - 1e-9) <= ratio <= max(before + after) * (1 + 1e-9)
    # A structure without measurements at a shape: its own elsewhere, else the dense layer's, else none.
    for kind, shape, expected in ((Monarch, SMALL, elsewhere), (BlockSparse, SMALL, dense), (BlockSparse, LARGE, 1.0)):
        ratio, source = ratio_of(kind.menu(shape.sizes)[0], shape)
        assert ratio == pytest.approx(expected)
        assert source == ("roofline" if (kind, shape) == (BlockSparse, LARGE) else "corrected")


@settings(max_examples=10, deadline=None)
@given(ratio=ratios)
def test_interpolation_is_of_logarithms(ratio: float) -> None:
    """A power law between two measurements is met."""
    first, *middle, last = sorted(LowRank.menu(LARGE.sizes), key=lambda each: predicted(each, LARGE))
    ends = [predicted(each, LARGE) for each in (first, last)]
    corrections = Corrections([measured(first, LARGE, 1.0), measured(last, LARGE, ratio)])
    steepness = torch.tensor(ratio).double().log() / torch.tensor(ends[1] / ends[0]).double().log()
    for each in middle[:: len(middle) // 5]:
        expected = predicted(each, LARGE)
        assert corrections.of(LARGE, each, expected) == pytest.approx(
            expected * float((expected / ends[0]) ** steepness)
        )


def surveyed(slowness: Mapping[str, float], monkeypatch: pytest.MonkeyPatch) -> Survey:
    """With a timer on which a structure takes so many times as long as the dense layer, and by its setting more."""

    def timer(structure: Structure | None, shape: Shape, tokens: int, device: torch.device) -> Taken:
        if structure is None:
            return Taken(1.0, 1.0)
        parameters = structure.cost(*shape).at(tokens)["parameters"]
        return Taken(slowness[structure.name] * (1 + parameters / 1e6), 1.0)

    monkeypatch.setattr(surveying, "measured_times", partial(measured_times, timer=timer))
    return survey(make(), structures=list(slowness), timing_seconds=60, tokens=64, progress=False)


def chosen(plan: Plan) -> set[str]:
    return {"dense" if each.structure is None else each.structure.name for each in plan.layers.values()}


@pytest.mark.parametrize("budget", [Budget(time=0.9), Budget(loss=1e9)])
def test_what_was_measured_slower_than_dense_is_not_chosen(budget: Budget, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = surveyed({"low_rank": 3.0, "pivoted_low_rank": 0.5}, monkeypatch)
    assert chosen(slow.plan(budget)) <= {"dense", "pivoted_low_rank"}
    assert "pivoted_low_rank" in chosen(slow.plan(budget))
    other = surveyed({"low_rank": 0.5, "pivoted_low_rank": 3.0}, monkeypatch)
    assert "pivoted_low_rank" not in chosen(other.plan(budget))
    assert "low_rank" in chosen(other.plan(budget))


def test_where_all_were_measured_slower_dense_is_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = surveyed({"low_rank": 3.0, "monarch": 1.1}, monkeypatch)
    assert chosen(slow.plan(Budget(loss=1e9))) == {"dense"}
    with pytest.raises(PlanError, match=r"time 2\.7 \(least possible alone: 3\)"):
        slow.plan(Budget(time=0.9))
    assert chosen(slow.plan(Budget(params=0.5))) - {"dense"}  # where time has no limit they may be


@settings(max_examples=10, deadline=None)
@given(slowness=st.fixed_dictionaries({"low_rank": ratios, "monarch": ratios}), share=st.floats(0.3, 1.0))
def test_no_layer_takes_longer_than_dense_where_time_counts(slowness: dict[str, float], share: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        known = surveyed(slowness, patch)
    for budget in (Budget(time=share), Budget(loss=1e9)):
        try:
            plan = known.plan(budget)
        except PlanError:
            continue
        for each in plan.layers.values():
            assert each.costs["time"] <= each.dense_costs["time"]


def test_a_setting_that_only_the_roofline_finds_slow_is_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left out of a menu is what corrected times find worse, too."""
    plain = survey(make(), structures=["low_rank", "monarch"], tokens=64, progress=False)
    fast = surveyed({"low_rank": 0.5, "monarch": 1e-3}, monkeypatch)

    def count(known: Survey) -> int:
        return sum(_is("monarch", each) for menu in known.menus.values() for each in menu)

    assert count(fast) > count(plain)


def _is(name: str, candidate: Candidate) -> bool:
    return candidate.structure is not None and candidate.structure.name == name


def test_a_plan_says_where_its_times_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = survey(make(), tokens=64, progress=False)
    assert plain.times == ()
    text = str(plain.plan(Budget(time=2.0)))
    assert "times of layers: 3 predicted by the roofline alone" in text
    assert "times of layers" not in str(plain.plan(Budget(params=0.5)))
    known = surveyed({"low_rank": 0.5}, monkeypatch)
    plan = known.plan(Budget(params=0.5, time=2.0))
    sources = [each.time_from for each in plan.layers.values()]
    assert set(sources) <= {"corrected", "measured"}
    assert "roofline" not in str(plan)
    for source, words in (("measured", "measured"), ("corrected", "predicted and corrected by measurements")):
        if source in sources:
            assert f"{sources.count(source)} {words}" in str(plan)


def test_where_nothing_can_be_timed_the_roofline_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "MEASURED_DEVICES", ("cuda",))
    plan = restructure_(make(), Budget(time=1.5), tokens=32, progress=False)
    assert {each.time_from for each in plan.layers.values()} == {"roofline"}
    with pytest.raises(UnsupportedError, match="cannot measure on device 'cpu'"):
        restructure_(make(), Budget(time=1.5), timing_seconds=1, tokens=32, progress=False)


def test_real_layers_are_timed_where_the_budget_needs_it_and_random_numbers_are_left() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    plan = restructure_(make(), Budget(time=1.5), tokens=32, progress=False)
    assert {each.time_from for each in plan.layers.values()} == {"measured"}  # the dense ones lose least
    model = make()
    torch.manual_seed(3)
    known = survey(model, tokens=32, timing_seconds=60, progress=False)
    assert torch.equal(torch.rand(2), expected)
    assert len(known.times) == 3 * (1 + 2 * 5)  # shapes; the dense layer, and of two structures five settings
    assert all(each.seconds > 0 for each in known.times)
    assert {each.device for each in known.times} == {device_profile(CPU).name}
    assert {each.tokens for each in known.times} == {32}

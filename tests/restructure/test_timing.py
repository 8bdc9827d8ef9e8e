"""What restructure_ chooses by measured times, and what it keeps of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structfly import Budget, Plan, Survey, measure, restructure_, survey
from structfly.errors import ArgumentError, ConfigError, PlanError, UnsupportedError
from structfly.layer_times import store
from structfly.layer_times.known import LayerTimes
from structfly.patterns.linear.candidates import Candidate
from structfly.patterns.low_rank import LowRank
from structfly.patterns.structure import Structure
from structfly.records.layer import LayerSizes, Passes
from structfly.restructure import surveying
from tests.layer_times.fabricated import CPU, Slow, entry, keep
from tests.restructure.models import HIDDEN, OUT, WIDE, make

ratios = st.floats(0.01, 100.0)


def surveyed(slowness: Mapping[str, float], monkeypatch: pytest.MonkeyPatch) -> Survey:
    """On a device that has these structures slow."""
    keep()
    monkeypatch.setattr(surveying, "LayerTimes", partial(LayerTimes, timer=Slow(slowness)))
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


SIZES = [LayerSizes(HIDDEN, WIDE), LayerSizes(WIDE, HIDDEN), LayerSizes(HIDDEN, OUT)]


@settings(max_examples=20)
@given(data=st.data(), passes=st.sampled_from(["forward", "training"]), share=st.floats(0.5, 1.0))
def test_whatever_the_file_holds_nothing_is_chosen_that_it_has_slower_than_dense(
    data: st.DataObject, passes: Passes, share: float
) -> None:
    """At the tokens asked for and interpolated; with a further limit that only slow layers could keep, too."""
    relative: dict[LayerSizes, dict[Structure, float]] = {
        sizes: data.draw(st.dictionaries(st.sampled_from(LowRank.menu(sizes)), ratios, max_size=8)) for sizes in SIZES
    }
    tokens = data.draw(st.sampled_from([(64,), (48, 80)]))
    keep(*(entry(sizes, at, known, passes=passes) for sizes, known in relative.items() for at in tokens))
    known = survey(make(), structures=["low_rank"], tokens=64, timing_seconds=0, passes=passes, progress=False)
    for budget in (
        Budget(time=share),
        Budget(loss=1e9),
        Budget(time=1.0, params=share),
        Budget(loss=1e9, params=share),
    ):
        try:
            plan = known.plan(budget)
        except PlanError:
            continue
        for each in plan.layers.values():
            if each.structure in (of_shape := relative[each.sizes]):
                assert of_shape[each.structure] <= 1.0
                assert each.time_from == ("measured" if len(tokens) == 1 else "interpolated")
    assert known.plan(Budget(time=2.0)) == known.plan(Budget(time=2.0))


def test_what_was_measured_is_kept_and_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    first, again = Slow({"low_rank": 0.5}), Slow({"low_rank": 9.0})
    for timer in (first, again):
        monkeypatch.setattr(surveying, "LayerTimes", partial(LayerTimes, timer=timer))
        plan = restructure_(make(), Budget(time=0.9), structures=["low_rank"], tokens=64, progress=False)
    assert len(first.calls) == 3 * (1 + 5)
    assert again.calls == []
    assert plan.untimed == 0
    other = Slow({"low_rank": 0.5})
    monkeypatch.setattr(surveying, "LayerTimes", partial(LayerTimes, timer=other))
    restructure_(make(), Budget(time=0.9), structures=["low_rank"], tokens=64, passes="training", progress=False)
    assert len(other.calls) == len(first.calls)  # nothing is known of training


def test_a_budget_that_does_not_count_time_reads_no_times() -> None:
    store.user_path().write_text("{")
    restructure_(make(), Budget(params=0.5), tokens=64, progress=False)
    with pytest.raises(ConfigError, match=r"line 1: no JSON: .*\n.*measure again"):
        restructure_(make(), Budget(time=0.9), tokens=64, progress=False)


def test_the_plan_says_that_the_time_was_up() -> None:
    plan = restructure_(make(), Budget(time=1.5), structures=["low_rank"], timing_seconds=0, tokens=64, progress=False)
    assert plan.untimed == 3 * (1 + 5)
    assert "times of layers: 3 predicted by the roofline alone; 18 that were to be timed were not" in str(plan)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ArgumentError, match="passes is 'backward'; allowed: forward, training"):
        survey(make(), passes="backward", progress=False)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="timing_seconds is -1"):
        survey(make(), timing_seconds=-1, progress=False)


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
    assert {each.device for each in known.times} == {measure.device_name(CPU)}
    assert {each.tokens for each in known.times} == {32}

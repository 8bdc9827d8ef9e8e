"""Layers of graphs under a budget that counts time: measured on their device, at the graph's own number of rows."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import structfly
from structfly import PlanError, backend
from structfly.layer_times import store
from structfly.layer_times.known import LayerTimes
from structfly.patterns.low_rank import LowRank
from structfly.patterns.structure import Structure
from structfly.records import SiteReport
from structfly.records.layer import LayerSizes
from tests.compiling import Rewritten
from tests.layer_times.fabricated import Slow, entry, keep
from tests.patterns.linear.layers import planned

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own deprecations
UP, DOWN = LayerSizes(32, 64), LayerSizes(64, 32)
ratios = st.floats(0.01, 100.0)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(*UP), nn.Linear(*DOWN)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(torch.relu(self.up(x)))
        return result


def sites_of(budget: Mapping[str, Any], rows: int = 8, **options: Any) -> dict[str, SiteReport]:
    torch.manual_seed(0)
    fast = Rewritten(Net().eval(), {"strict": True, "structures": ["low_rank"], "budget": budget, **options})
    with torch.no_grad():
        fast(torch.randn(rows, 32))
    return {site.name: site for site in fast.sites}


def on_device(timer: Slow, monkeypatch: pytest.MonkeyPatch) -> Slow:
    monkeypatch.setattr(backend, "LayerTimes", partial(LayerTimes, timer=timer))
    return timer


@settings(max_examples=10)
@given(data=st.data(), share=st.floats(0.5, 1.0), rows=st.sampled_from([8, 9]))
def test_whatever_the_file_holds_nothing_is_chosen_that_it_has_slower_than_dense(
    data: st.DataObject, share: float, rows: int
) -> None:
    """Measured at 8 rows, interpolated at 9."""
    relative: dict[LayerSizes, dict[Structure, float]] = {
        sizes: data.draw(st.dictionaries(st.sampled_from(LowRank.menu(sizes)), ratios, max_size=10))
        for sizes in (UP, DOWN)
    }
    keep(*(entry(sizes, at, known, dense=1e-4) for sizes, known in relative.items() for at in (8, 10)))
    for budget in ({"time": share}, {"loss": 1e9}, {"loss": 1e9, "params": share}):
        try:
            sites = sites_of(budget, rows, timing_seconds=0)
        except BackendCompilerFailed as error:
            if not isinstance(error.inner_exception, PlanError):
                raise
            continue
        for name, sizes in (("up", UP), ("down", DOWN)):
            by_name = {repr(structure): time for structure, time in relative[sizes].items()}
            assert by_name.get(sites[name].candidate, 0.0) <= 1.0


def test_what_is_chosen_was_timed_and_the_report_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = on_device(Slow({"low_rank": 0.5}), monkeypatch)
    sites = sites_of({"time": 0.8})
    assert {(shape.sizes, tokens, passes) for _, shape, tokens, passes in timer.calls} == {
        (UP, 8, "forward"),
        (DOWN, 8, "forward"),
    }
    timed = {repr(structure) for structure, *_ in timer.calls}
    for site in sites.values():
        assert site.candidate in timed or site.candidate == "dense"
        assert (site.time_from, site.seconds_kept) == ("measured", 1.0)
        assert "times of the 22 candidates: " in site.reason
        assert "predicted and corrected by measurements" in site.reason
        assert "timing_seconds" not in site.reason
    assert any(site.status == "rewritten" for site in sites.values())
    calls = len(timer.calls)
    again = sites_of({"time": 0.8})
    assert len(timer.calls) == calls, "what was measured was not kept"
    assert {name: site.candidate for name, site in again.items()} == {
        name: site.candidate for name, site in sites.items()
    }


def test_a_structure_that_the_roofline_finds_fast_and_the_device_slow_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 50_000
    fast = sites_of({"loss": 1e9}, rows, timing_seconds=0)
    assert fast["up"].status == "rewritten"
    assert fast["up"].reason.endswith("for no more time could be spent on it within timing_seconds")
    timer = on_device(Slow({"low_rank": 1.5}), monkeypatch)
    slow = sites_of({"loss": 1e9}, rows)
    assert {site.status for site in slow.values()} == {"kept"}
    assert "measured slower than dense: " in slow["up"].reason
    assert timer.calls
    with pytest.raises(BackendCompilerFailed, match=r"PlanError: .* they were measured slower than dense"):
        sites_of({"time": 0.9}, rows)


def test_graphs_of_few_and_of_many_rows_take_what_is_fast_for_each() -> None:
    model = Net().eval()
    fast, slow = LowRank.menu(UP)[0], LowRank.menu(UP)[-1]
    keep(
        *(entry(sizes, 1, dict.fromkeys(LowRank.menu(sizes), 3.0)) for sizes in (UP, DOWN)),
        *(entry(sizes, 512, {fast: 0.5, slow: 0.9}) for sizes in (UP, DOWN)),
    )
    options = {"budget": {"loss": 1e9}, "structures": ["low_rank"], "timing_seconds": 0, "strict": True}
    compiled = Rewritten(model, options, dynamic=False)
    with torch.no_grad():
        compiled(torch.randn(1, 32))
        compiled(torch.randn(512, 32))
    decode, prompt = compiled.sites[:2], compiled.sites[2:]
    assert [site.candidate for site in decode] == ["dense", "dense"]
    assert [site.candidate for site in prompt] == [repr(fast)] * 2


def test_a_weight_that_is_read_twice_is_timed_at_both_numbers_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    timer, layer = on_device(Slow({"low_rank": 0.5}), monkeypatch), nn.Linear(32, 32)
    options = {"budget": {"time": 0.8}, "structures": ["low_rank"], "strict": True}
    fast = Rewritten(lambda x: layer(layer(x)[:3]), options)
    with torch.no_grad():
        fast(torch.randn(8, 32))
    (site,) = fast.sites
    assert {tokens for _, _, tokens, _ in timer.calls} == {3, 8}
    assert site.seconds_kept == 2.0
    assert site.time_from == "measured"


@pytest.mark.parametrize("options", [{"budget": {"params": 0.5}}, {"plan": planned(up=(LowRank(rank=3), UP))}])
def test_where_time_does_not_count_nothing_is_timed_or_read(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store.user_path().write_text("{")
    timer = on_device(Slow({"low_rank": 0.5}), monkeypatch)
    fast = Rewritten(Net().eval(), {"strict": True, **options})
    with torch.no_grad():
        fast(torch.randn(8, 32))
    assert timer.calls == []
    assert "rewritten" in fast.statuses
    with pytest.raises(BackendCompilerFailed, match=r"ConfigError: .*, line 1: no JSON"):
        sites_of({"time": 0.8})


def test_no_measurement_begins_when_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = Slow({"low_rank": 0.5})
    clock = iter(range(10_000))
    monkeypatch.setattr(backend, "LayerTimes", partial(LayerTimes, timer=timer, clock=lambda: float(next(clock))))
    sites = sites_of({"time": 0.8}, timing_seconds=2)
    assert len(timer.calls) == 2  # each takes a second
    assert sites["down"].reason.endswith("for no more time could be spent on it within timing_seconds")


def test_real_layers_are_timed_where_a_model_is_compiled() -> None:
    options: Any = {"budget": {"loss": 1e9}, "structures": ["low_rank", "monarch"], "strict": True}
    model = Net().eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        report = structfly.explain(model, options=options)(torch.randn(8, 32))
    (kept,) = {(each.precision, each.tokens) for each in store.read_user_times().layers}
    assert kept == ("bfloat16", 8)
    for site in report.sites:
        assert site.time_from == "measured"
        assert site.seconds is not None
        assert site.seconds <= (site.seconds_kept or 0.0)
    assert "measured time" in str(report)

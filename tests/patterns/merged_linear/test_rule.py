"""Structured layers run as one dense weight: what is computed, when it is chosen, and what follows the factors."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import structfly
from structfly import StructuredLinear, backend
from structfly.layer_times import store
from structfly.layer_times.known import LayerTimes
from structfly.patterns.blast import Blast
from structfly.patterns.block_sparse import BlockSparse
from structfly.patterns.low_rank import LowRank
from structfly.patterns.merged_linear import site, weights
from structfly.patterns.monarch import Monarch
from structfly.patterns.pivoted_low_rank import PivotedLowRank
from structfly.patterns.pixelfly import Pixelfly
from structfly.patterns.structure import Structure
from structfly.patterns.structures import STRUCTURES
from structfly.records.layer import LayerSizes
from tests.compiling import Rewritten
from tests.layer_times.fabricated import Slow, keep
from tests.oracle import assert_as_accurate

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own deprecations
LEAST_TIME: Any = {"budget": {"loss": 0}, "strict": True}
SIZES, LARGE = LayerSizes(16, 24), LayerSizes(128, 128)
SLOW, FAST = 2.0, 0.5  # the op's time, that of the dense weight being 1


@pytest.fixture(autouse=True)
def _slow(monkeypatch: pytest.MonkeyPatch) -> None:
    on_device(SLOW, monkeypatch)


def on_device(relative: float, monkeypatch: pytest.MonkeyPatch) -> None:
    timer = Slow({"merged": relative, "low_rank": 9.0, "pivoted_low_rank": 9.0})
    monkeypatch.setattr(backend, "LayerTimes", partial(LayerTimes, timer=timer))


class Net(nn.Module):
    def __init__(self, structure: Structure, sizes: LayerSizes = SIZES, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = StructuredLinear(structure, *sizes, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.tanh(self.layer(torch.tanh(x)))
        return result


def run(model: nn.Module, x: Tensor, options: Mapping[str, object] = LEAST_TIME) -> tuple[Tensor, Rewritten]:
    fast = Rewritten(model, options)
    with torch.no_grad():
        return fast(x), fast


def dense_nodes(fast: Rewritten) -> int:
    return len(fast.calls_of(torch.nn.functional.linear))


ONE_OP = [name for name in STRUCTURES if name != "pixelfly"]  # whose factors are weighed first


@pytest.mark.parametrize("name", ONE_OP)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_merged_weight_computes_what_the_layer_does(name: str, dtype: torch.dtype) -> None:
    first, *_, last = STRUCTURES[name].menu(LARGE)
    for structure in (first, last):
        model, x = Net(structure, LARGE, dtype), torch.randn(3, 5, 128, dtype=dtype)
        keep()
        value, fast = run(model, x)
        (found,) = fast.sites
        assert (found.status, found.candidate, found.name) == ("rewritten", "merged", "layer")
        with torch.no_grad():
            exact = copy.deepcopy(model).double()(x.double())
            dense = nn.Sequential(nn.Tanh(), model.layer.to_linear(), nn.Tanh())(x)
        assert_as_accurate(value, dense, exact, dtype, "value")


@settings(max_examples=10)
@given(
    sizes=st.tuples(st.integers(2, 20), st.integers(2, 20)),
    rank=st.integers(1, 8),
    rows=st.integers(1, 6),
    faster=st.booleans(),
)
def test_what_was_measured_faster_is_taken(sizes: tuple[int, int], rank: int, rows: int, faster: bool) -> None:
    keep()
    with pytest.MonkeyPatch.context() as patch:
        on_device(FAST if faster else SLOW, patch)
        model = Net(LowRank(rank=min(rank, *sizes)), LayerSizes(*sizes))
        x = torch.randn(rows, sizes[0])
        value, fast = run(model, x)
        (found,) = fast.sites
        assert found.status == ("kept" if faster else "rewritten")
        assert found.time_from == "measured"
        assert (found.seconds, found.seconds_kept) == ((FAST, FAST) if faster else (1.0, SLOW))
        assert f"measured for {rows} rows" in found.reason
        with torch.no_grad():
            torch.testing.assert_close(value, model(x))
        on_device(SLOW if faster else FAST, patch)  # what the file has is not measured again
        assert run(model, x)[1].statuses == fast.statuses


def test_graphs_of_few_and_of_many_rows_run_one_layer_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net(LowRank(rank=3))
    run(model, torch.randn(1, 16))  # slow: kept in the file for one row
    on_device(FAST, monkeypatch)
    fast = Rewritten(model, LEAST_TIME, dynamic=False)
    with torch.no_grad():
        for rows in (1, 512):
            x = torch.randn(rows, 16)
            torch.testing.assert_close(fast(x), model(x))
    assert [site.candidate for site in fast.sites] == ["merged", "as it is"]


def test_the_weight_follows_the_factors() -> None:
    model, x = Net(LowRank(rank=3)), torch.randn(4, 16)
    fast = Rewritten(model, LEAST_TIME)
    with torch.no_grad():
        for change in (
            lambda: None,
            lambda: model.layer.left.mul_(2),  # type: ignore[operator]
            lambda: model.load_state_dict(Net(LowRank(rank=3), LayerSizes(16, 24)).state_dict()),
            lambda: setattr(model.layer, "right", nn.Parameter(torch.randn(3, 16))),
        ):
            change()
            torch.testing.assert_close(fast(x), model(x))
        before = fast(x)
        model.layer.left.data.mul_(-3)  # type: ignore[operator]
        assert torch.equal(fast(x), before)
        structfly.refresh()
        torch.testing.assert_close(fast(x), model(x))


def test_it_is_made_once_shared_by_graphs_and_goes_with_the_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[None] = []
    original = site.merged

    def counted(*arguments: Any) -> Tensor:
        made.append(None)
        return original(*arguments)

    monkeypatch.setattr(weights, "merged", counted)
    model = Net(LowRank(rank=3))
    fast = Rewritten(model, LEAST_TIME, dynamic=False)
    with torch.no_grad():
        for rows in (1, 2, 1, 2):
            fast(torch.randn(rows, 16))
    assert len(fast.graphs) == 2
    assert len(made) == 1
    of_first = weights._merged[model.layer.right]
    (held,) = of_first.values()
    weight = weakref.ref(held.weight)
    del held, of_first, fast
    torch._dynamo.reset()
    gc.collect()
    assert weight() is None


def test_modes_of_the_call_do_not_reach_the_weight() -> None:
    model, x = Net(Monarch(blocks_in=4, blocks_out=4, block_rank=2)), torch.randn(4, 16)
    fast = Rewritten(model, LEAST_TIME)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        value, expected = fast(x), model(x)
    assert dense_nodes(fast) == 1
    assert value.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(value, expected, rtol=2e-2, atol=2e-2)
    (held,) = weights._merged[model.layer.factor_1].values()
    assert not held.weight.is_inference()


def test_through_inductor() -> None:
    model, x = Net(PivotedLowRank(rank=3)), torch.randn(4, 16)
    fast: Any = torch.compile(model, backend="structfly", options=LEAST_TIME, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
        report = structfly.explain(model, options=LEAST_TIME)(x)
    assert [(found.status, found.candidate) for found in report.sites] == [("rewritten", "merged")]
    assert "stay in memory" not in str(report)  # that is of layers that were dense


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"budget": {"params": 0.5}},
        {"budget": {"loss": 0, "params": 2.0}},
        {"budget": {"time": 1.0, "weight_bytes": 2.0}},
    ],
)
def test_without_a_budget_of_time_or_with_one_of_memory_layers_stay(options: dict[str, Any]) -> None:
    _, fast = run(Net(LowRank(rank=3)), torch.randn(4, 16), {"strict": True, **options})
    assert fast.sites == []


def test_layers_that_cannot_be_merged_say_why() -> None:
    model, x = Net(LowRank(rank=3)), torch.randn(4, 16)
    fast = Rewritten(model, LEAST_TIME)
    fast(x).sum().backward()
    assert [(site.status, site.reason) for site in fast.sites] == [
        ("missed", "this graph trains, and the factors of a merged weight would not")
    ]
    _, fast = run(Net(Pixelfly(grid=2, n_factors=1, rank=2)), x)
    assert set(fast.statuses) == {"missed"}
    assert {site.reason.partition(",")[0] for site in fast.sites} == {"its factors are made in the graph"}
    _, fast = run(model, x, {**LEAST_TIME, "timing_seconds": 0})
    assert [(site.status, site.reason) for site in fast.sites] == [
        ("kept", "its time could not be measured within timing_seconds")
    ]
    _, fast = run(model, x, {**LEAST_TIME, "rules": {"merged_linear": False}})
    assert fast.statuses == ["kept"]


def test_what_was_measured_is_kept_as_the_op_has_it() -> None:
    for kind in (Blast, BlockSparse):
        run(Net(kind.menu(LARGE)[0], LARGE), torch.randn(4, 128))
    (entry,) = store.read_user_times().layers
    assert [each.op.partition("_v")[0] for each in entry.ops] == ["blast", "block_sparse"]
    assert {each.relative for each in entry.ops} == {SLOW}


def test_real_layers_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "LayerTimes", LayerTimes)
    value, fast = run(model := Net(BlockSparse.menu(LARGE)[0], LARGE), x := torch.randn(4, 128))
    (found,) = fast.sites
    assert found.time_from == "measured"
    assert (found.seconds or 0.0) <= (found.seconds_kept or 0.0)
    with torch.no_grad():
        torch.testing.assert_close(value, model(x))

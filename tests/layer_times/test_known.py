"""What is known of layers' times: by measurement on first need within a bound, from files, and in between."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structfly.layer_times import timing
from structfly.layer_times.known import LayerTimes
from structfly.layer_times.store import Origin, TimesFile, known_times
from structfly.layer_times.timing import Taken, layer_seconds
from structfly.patterns.block_sparse import BlockSparse
from structfly.patterns.low_rank import LowRank
from structfly.patterns.monarch import Monarch
from structfly.patterns.structure import Structure, StructuredLinear
from structfly.patterns.structures import STRUCTURES
from structfly.records.layer import LayerSizes, Passes, Shape
from tests.layer_times.fabricated import CONDITIONS, CPU, HERE, LARGE, SMALL, Slow, entry, predicted

TOKENS = CONDITIONS.tokens
OFFERED: Mapping[Shape, list[type[Structure]]] = {SMALL: [LowRank, Monarch], LARGE: [LowRank, BlockSparse]}
RANK = LowRank(rank=3)


def times(file: TimesFile | None = None, **options: Any) -> LayerTimes:
    return LayerTimes(CPU, CONDITIONS.profile, known_times(HERE, file or TimesFile()), **{"seconds": 1e9, **options})


def timed_by(seconds: float = 1e9, rounds: int = 3) -> list[tuple[Structure | None, Shape]]:
    """What is timed, in order, where each measurement takes a second."""
    timer, count = Slow(dict.fromkeys(("low_rank", "monarch", "block_sparse"), 1.0)), itertools.count()
    known = times(seconds=seconds, timer=timer, clock=lambda: float(next(count)))
    known.spread(OFFERED, TOKENS, rounds=rounds)
    assert {(tokens, passes) for _, _, tokens, passes in timer.calls} <= {(TOKENS, "forward")}
    assert len(timer.calls) + len(known.refused) == (2 + 4 * 5 if rounds == 3 else 2 + 4)
    return [(structure, shape) for structure, shape, _, _ in timer.calls]


def test_the_dense_layers_are_timed_then_settings_spread_over_the_menus() -> None:
    order = timed_by()
    assert order[:2] == [(None, SMALL), (None, LARGE)]
    assert [(type(structure), shape) for structure, shape in order[2:6]] == [
        (LowRank, SMALL),
        (Monarch, SMALL),
        (LowRank, LARGE),
        (BlockSparse, LARGE),
    ]
    assert len(set(order)) == len(order) == 2 + 4 * 5
    assert timed_by(rounds=1) == order[:6]
    for kind, shape in ((LowRank, SMALL), (Monarch, SMALL), (LowRank, LARGE), (BlockSparse, LARGE)):
        all_times = sorted(predicted(each, shape) for each in kind.menu(shape.sizes))
        mine = [predicted(each, there) for each, there in order if isinstance(each, kind) and there == shape]
        assert min(mine) == all_times[0]
        assert max(mine) == all_times[-1]
        assert mine[0] == pytest.approx(all_times[len(all_times) // 2], rel=0.1)


@pytest.mark.parametrize("seconds", [0.0, 0.5, 1.5, 9.5])
def test_no_measurement_begins_after_the_time_that_is_allowed(seconds: float) -> None:
    assert timed_by(seconds) == timed_by()[: math.ceil(seconds)]


def test_a_layer_that_takes_more_memory_than_there_is_is_left_out() -> None:
    def timer(*_: object) -> Taken:
        raise torch.OutOfMemoryError

    known = times(timer=timer)
    assert not known.measure(RANK, SMALL, 8)
    assert known.refused == {(RANK, SMALL, 8)}
    assert known.of(RANK, SMALL, 8).source == "roofline"


@settings(max_examples=5)
@given(drifts=st.lists(st.floats(0.1, 10.0), min_size=6, max_size=6))
def test_times_are_relative_to_the_dense_layer_in_the_same_rounds(drifts: list[float]) -> None:
    """On a device that was as fast as it likes."""
    drift = iter(drifts)

    def timer(structure: Structure | None, *_: object) -> Taken:
        dense = next(drift)
        return Taken(dense if structure is None else 3 * dense, dense)

    known = times(timer=timer)
    known.spread({SMALL: [Monarch]}, TOKENS)
    found = {each.structure: each.seconds for each in known.at(TOKENS)}
    assert found.pop(None) == drifts[0]
    assert list(found.values()) == pytest.approx([3 * drifts[0]] * 5)


def test_what_is_known_is_not_measured_again() -> None:
    timer = Slow({"low_rank": 2.0})
    known = times(TimesFile(layers=(entry(SMALL.sizes, 8, {RANK: 0.5}),)), timer=timer)
    assert known.of(RANK, SMALL, 8) == (0.5, "measured")
    assert not known.measure(RANK, SMALL, 8)
    assert not known.measure(None, SMALL, 8)
    assert timer.calls == []
    assert list(known.entries()) == []
    other = LowRank(rank=4)
    assert known.of(other, SMALL, 8).source == "corrected"
    assert known.measure(other, SMALL, 8)
    assert not known.measure(other, SMALL, 8)
    assert len(timer.calls) == 1
    (added,) = known.entries()  # what was measured now, and no more
    assert added == entry(SMALL.sizes, 8, {other: known.of(other, SMALL, 8).seconds})


def test_what_is_measured_beside_a_shipped_entry_brings_its_own_dense_layer() -> None:
    """So that the file that keeps it says nothing that was measured elsewhere."""
    shipped = entry(SMALL.sizes, 8, {RANK: 0.5}, dense=7.0, origin=HERE._replace(torch="2.0"))
    known = LayerTimes(CPU, CONDITIONS.profile, [shipped], seconds=1e9, timer=Slow({"low_rank": 2.0}))
    assert known.of(RANK, SMALL, 8) == (3.5, "measured")
    other = LowRank(rank=4)
    known.measure(other, SMALL, 8)
    (added,) = known.entries()
    assert (added.dense, set(added.relative), added.origin) == (1.0, {other}, HERE)
    assert known.of(RANK, SMALL, 8) == (0.5, "measured")


other_origins = [
    HERE._replace(device="another"),
    HERE._replace(torch="2.0"),
    HERE._replace(structfly="0.0.1"),
]


@pytest.mark.parametrize("origin", other_origins)
def test_measurements_of_other_devices_and_versions_do_not_count(origin: Origin) -> None:
    known = times(TimesFile(layers=(entry(SMALL.sizes, 8, {RANK: 0.5}, origin=origin),)))
    assert known.at(8) == ()


def test_nor_do_those_of_other_sizes_dtypes_and_passes() -> None:
    known = times(
        TimesFile(
            layers=(
                entry(LARGE.sizes, 8, {RANK: 0.5}),
                entry(SMALL.sizes, 8, {RANK: 0.5}, precision="bfloat16"),
                entry(SMALL.sizes, 8, {RANK: 0.5}, passes="training"),
                entry(SMALL.sizes, 8, {RANK: 0.5}, precision="tf32"),
            )
        )
    )
    assert known.of(RANK, SMALL, 8).source != "measured"
    assert known.of(RANK, SMALL._replace(dtype=torch.bfloat16), 8).source == "measured"
    training = times(TimesFile(layers=(entry(SMALL.sizes, 8, {RANK: 0.5}, passes="training"),)), passes="training")
    assert training.of(RANK, SMALL, 8) == (0.5, "measured")


@settings(max_examples=50)
@given(
    ends=st.tuples(st.integers(1, 500), st.integers(1, 500)).map(sorted),
    at=st.integers(1, 600),
    dense=st.tuples(*[st.floats(1e-3, 1e3)] * 2),
    relative=st.tuples(*[st.floats(1e-3, 1e3)] * 2),
)
def test_between_measurements_times_follow_a_power_law_and_never_beyond(
    ends: list[int], at: int, dense: tuple[float, float], relative: tuple[float, float]
) -> None:
    first, last = ends
    layers = {
        tokens: entry(SMALL.sizes, tokens, {RANK: times}, dense=seconds)
        for tokens, seconds, times in zip(ends, dense, relative, strict=True)
    }
    known = times(TimesFile(layers=tuple(layers.values())))
    found = known.of(RANK, SMALL, at)
    if at in layers:
        assert found.source == "measured"
        assert found.seconds == pytest.approx(layers[at].dense * layers[at].relative[RANK])
    elif first < at < last <= 2 * first:
        share = (math.log(at) - math.log(first)) / (math.log(last) - math.log(first))
        seconds = [each.dense * each.relative[RANK] for each in layers.values()]
        assert found.source == "interpolated"
        assert found.seconds == pytest.approx(seconds[0] ** (1 - share) * seconds[1] ** share)
    else:
        assert found == (predicted_at(RANK, at), "roofline")


def predicted_at(structure: Structure | None, tokens: int) -> float:
    return times().predicted(structure, SMALL, tokens)


def test_training_is_predicted_to_take_three_forward_passes() -> None:
    forward, training = times(), times(passes="training")
    for each in (None, RANK):
        assert training.predicted(each, SMALL, 8) == pytest.approx(3 * forward.predicted(each, SMALL, 8))


@pytest.mark.parametrize("passes", ["forward", "training"])
def test_real_layers_are_timed_whatever_mode_the_caller_stands_in(passes: Passes) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    shape = Shape(LayerSizes(16, 24), torch.float32)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        taken = layer_seconds(RANK, shape, 4, CPU, passes)
    assert min(taken) > 0
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("name", STRUCTURES)
def test_what_is_timed_is_a_layer_of_the_structure(name: str) -> None:
    sizes = LayerSizes(128, 128)
    structure, x = STRUCTURES[name].menu(sizes)[0], torch.randn(3, 128)
    layer = timing._structured(structure, Shape(sizes, torch.float32), CPU)
    with torch.no_grad():
        y = layer(x)
        torch.testing.assert_close(y, x @ layer.to_dense().t(), rtol=1e-3, atol=1e-4)
    assert y.isfinite().all()
    assert y.norm() > 0


def test_a_training_step_makes_all_gradients_anew() -> None:
    layer, x = StructuredLinear(RANK, 16, 24, bias=False), torch.randn(4, 16, requires_grad=True)
    for _ in range(2):
        timing._step(layer, x, torch.ones(4, 24))
        x_grad, *grads = (each.grad for each in (x, *layer.parameters()))
        assert x_grad is not None
        torch.testing.assert_close(x_grad, layer.to_dense().sum(0).expand(4, -1))
        assert all(each is not None for each in grads)

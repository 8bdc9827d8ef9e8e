"""``structfly.time_layers`` and its command, on a device that is made up."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import structfly
from structfly.cli import main
from structfly.errors import ArgumentError, StructflyError, UnsupportedError
from structfly.layer_times import calibrating, store
from structfly.layer_times.known import LayerTimes
from structfly.layer_times.store import read_times, read_user_times
from structfly.records.layer import LayerSizes
from tests.layer_times.fabricated import Slow, entry, keep
from tests.restructure.models import make

SIZES = [LayerSizes(64, 48), LayerSizes(32, 64)]


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> Slow:
    timer = Slow({"low_rank": 0.5, "monarch": 2.0})
    monkeypatch.setattr(calibrating, "LayerTimes", partial(LayerTimes, timer=timer))
    return timer


def on_cpu(**changes: Any) -> structfly.LayerTimesReport:
    options = {"dtype": torch.float32, "device": "cpu", "structures": ["low_rank"], **changes}
    return structfly.time_layers(options.pop("layers", SIZES), options.pop("tokens", [1, 2]), **options)


def test_layers_are_timed_at_all_tokens_and_kept(device: Slow) -> None:
    report = on_cpu(passes=("forward", "training"), structures=["low_rank", "monarch"])
    asked = {(sizes, tokens, passes) for sizes in SIZES for tokens in (1, 2) for passes in ("forward", "training")}
    assert {(shape.sizes, tokens, passes) for _, shape, tokens, passes in device.calls} == asked
    assert len(device.calls) == len(asked) * (1 + 2 * 5)
    found = read_user_times()
    assert {(each.key.sizes, each.tokens, each.passes) for each in found.layers} == asked
    assert all(each.dense == 1.0 and len(each.structures) == 10 for each in found.layers)
    assert found.layers == report.layers
    assert found.devices == (report.rates,)
    assert report.rates.matrix_rate.keys() == {"float32"}
    assert report.refused == 0
    again = on_cpu(passes=("forward", "training"), structures=["low_rank", "monarch"])
    assert again.layers == ()
    assert again.rates == report.rates
    assert len(device.calls) == len(asked) * (1 + 2 * 5)


def test_what_is_shipped_is_measured_here_all_the_same(device: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "shipped_files", lambda: iter([store.TimesFile(layers=(entry(SIZES[0], 1, {}),))]))
    on_cpu(layers=SIZES[:1], tokens=[1])
    assert device.calls[0][0] is None


def test_where_the_time_is_up_what_is_most_wanted_has_been_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    timer, now = Slow({"low_rank": 0.5}), iter(range(1000))
    clocked = partial(LayerTimes, timer=timer, clock=lambda: float(next(now)))
    monkeypatch.setattr(calibrating, "LayerTimes", clocked)
    report = on_cpu(seconds=9, passes=("forward", "training"))  # each takes a second
    assert len(timer.calls) == 9
    middle = [(shape.sizes, tokens) for structure, shape, tokens, _ in timer.calls[:8] if structure is not None]
    assert sorted(middle) == sorted((sizes, tokens) for sizes in SIZES for tokens in (1, 2))
    assert {passes for *_, passes in timer.calls} == {"forward"}
    assert report.refused == 2 * 2 * 2 * (1 + 5) - 9
    assert "39 measurements were left out: the time was up" in str(report)


def test_the_command_prints_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "times.json"
    options = ["--device", "cpu", "--dtype", "float32", "--structures", "monarch", "--output", str(path)]
    assert main(["calibrate", "--layers", "64x48", "--tokens", "1", "8", *options]) == 0
    printed = capsys.readouterr().out
    assert "products in float32: " in printed
    assert "64x48, 8 tokens, float32, forward: dense 1e+06 us" in printed
    assert printed.count("   2.0") == 2 * 5
    assert printed.endswith(f"Kept in {path}.\n")
    assert {each.tokens for each in read_times(path).layers} == {1, 8}
    assert not store.user_path().exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "calibrate needs --shapes or --layers"),
        (["--layers", "64x48"], "--layers needs --tokens"),
        (["--layers", "64", "--tokens", "1"], "'64' is no layer; allowed: inputs x outputs, 4096x11008"),
        (["--layers", "64x48", "--tokens", "1", "--structures", "low"], "invalid choice: 'low'"),
    ],
)
def test_a_command_that_asks_for_nothing_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["calibrate", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": []}, "layers is empty; give at least one"),
        ({"tokens": []}, "tokens is empty; give at least one"),
        ({"layers": [(64, 0)]}, r"a layer is \(64, 0\); allowed: inputs and outputs, both above 0"),
        ({"tokens": [0]}, "tokens has 0; allowed: whole numbers above 0"),
        ({"structures": ["low"]}, "there is no structure 'low'; there are low_rank"),
        ({"passes": ["backward"]}, "passes has 'backward'; allowed: forward, training"),
        ({"seconds": math.nan}, "seconds is nan; allowed: a number above 0"),
        ({"dtype": torch.float8_e5m2}, "dtype is torch.float8_e5m2; allowed: float64"),
    ],
)
def test_wrong_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        on_cpu(**changes)


def test_what_cannot_be_kept_is_not_measured(device: Slow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StructflyError, match="measured times of layers cannot be kept"):
        on_cpu(path=tmp_path / "file" / "times.json")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedError, match="there is no CUDA device; name another one, such as cpu"):
        on_cpu(device="cuda")
    assert device.calls == []


def test_plans_take_what_was_timed_before(device: Slow) -> None:
    keep()
    on_cpu(layers=[(32, 64), (64, 32), (32, 24)], tokens=[64, 128])
    plan = structfly.restructure_(
        make(), structfly.Budget(time=0.8), structures=["low_rank"], tokens=90, timing_seconds=0, progress=False
    )
    assert {each.time_from for each in plan.layers.values()} <= {"interpolated", "corrected"}
    assert any(each.structure is not None for each in plan.layers.values())

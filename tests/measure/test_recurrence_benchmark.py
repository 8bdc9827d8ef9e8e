"""What the benchmark of recurrences measures, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import linear_recurrence as benchmark
from benchmarks.recording import Row
from benchmarks.recurrence_case import GATES, Case
from benchmarks.recurrence_layer import Layer
from benchmarks.recurrence_providers import OURS, PROVIDERS, Provider

SHAPE = (2, 37, 3)


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("provider", ["doubling", "loop", OURS])
def test_every_provider_computes_the_same(provider: str, gates: str) -> None:
    case = Case(SHAPE, "float64", "cpu", True, gates)
    made = case.call(PROVIDERS[provider])()
    found = case.errors(made, PROVIDERS[provider])
    assert found.keys() == {"states", "grad_gate", "grad_input"}
    assert max(found.values()) < 1e-12


def test_a_provider_that_has_time_last_computes_the_same() -> None:
    turned = Provider(lambda: lambda f, x: PROVIDERS["loop"].build()(f.mT, x.mT).mT, time_last=True)
    case = Case(SHAPE, "float64", "cpu", True)
    assert max(case.errors(case.call(turned)(), turned).values()) < 1e-12


def test_gates_are_what_they_are_called() -> None:
    usual, slow, ends = (Case((1, 100, 9), "float32", "cpu", False, gates).inputs[0] for gates in GATES)
    assert 0.79 <= usual.min() <= usual.max() <= 0.99
    assert 0.999 <= slow.min() <= slow.max() <= 1
    assert ends.eq(0).any()
    assert ends.eq(1).any()


@pytest.mark.parametrize(("training", "arrays"), [(False, 3), (True, 8)])
def test_the_copy_moves_what_any_method_does(training: bool, arrays: int) -> None:
    case = Case(SHAPE, "bfloat16", "cpu", training)
    copied = case.copy()()
    assert isinstance(copied, torch.Tensor)
    assert 2 * copied.numel() == arrays * 2 * 37 * 3 * 2 == case.bytes_moved


def run(tmp_path: Path, *arguments: str) -> list[dict[str, object]]:
    output = tmp_path / "result"
    benchmark.main(["--device", "cpu", *arguments, "--repeats", "2", "--output", str(output)])
    result = json.loads(output.with_suffix(".json").read_text())
    assert result["command"] == " ".join(
        ["python -m benchmarks.linear_recurrence --device cpu", *arguments, "--repeats 2"]
    )
    rows: list[dict[str, object]] = result["rows"]
    return rows


def test_a_table_has_times_ratios_and_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = (OURS, "doubling", "loop", "chunk_hgrn")
    rows = run(tmp_path, "--shapes", "1x40x3", "--providers", *names)
    found = {(row["provider"], row["metric"]) for row in rows}
    assert {(benchmark.COPY, "time_s"), (OURS, "x_copy"), (OURS, "x_doubling"), ("loop", "error_grad_gate")} <= found
    assert "chunk_hgrn" not in {row["provider"] for row in rows}
    assert "chunk_hgrn         left out: No module named 'fla'" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")  # torch's own deprecations
def test_a_layer_is_held_against_its_product_and_its_bytes(tmp_path: Path) -> None:
    rows = run(tmp_path, "--parts", "layer")
    for passes in ("forward", "forward+backward"):
        of_pass = {(row["provider"], row["metric"]): row["p50"] for row in rows if f", {passes}" in f"{row['mode']} "}
        assert {(OURS, "x_bound"), (benchmark.COMPILED, "x_bound")} <= set(of_pass)


def test_errors_are_those_of_all_gates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(benchmark.CHECKED, "cpu", (1, 300, 8))
    rows = run(tmp_path, "--parts", "errors")
    modes = [f"1x300x8 float32, forward+backward{end}" for end in ("", ", slow gates", ", ends gates")]
    assert list(dict.fromkeys(row["mode"] for row in rows)) == modes


def test_growth_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import growth_plot, plot

    monkeypatch.setitem(benchmark.GROWING, "cpu", [16, 32])
    run(tmp_path, "--parts", "growth")
    data = json.loads((tmp_path / "result.json").read_text())
    panels = growth_plot.read_points(data)
    assert [[point.steps for point in points if point.provider == OURS] for points in panels.values()] == [[16, 32]] * 2
    plot.main([str(tmp_path / "result.json")])
    assert "256 channels, batch 1, bfloat16, forward" in (tmp_path / "result.svg").read_text()


def test_late_peers_are_left_out(tmp_path: Path) -> None:
    rows = run(tmp_path, "--shapes", "1x40x3", "--seconds", "0")
    assert {row["provider"] for row in rows} == {OURS, benchmark.COPY}


def row(provider: str, mode: str, metric: str, value: float) -> Row:
    return Row.of_value(value, kernel=benchmark.KERNEL, provider=provider, mode=mode, metric=metric)


@pytest.mark.parametrize(("mode", "metric"), list(benchmark.BARS))
def test_a_missed_bar_is_told(mode: str, metric: str) -> None:
    device, bar = benchmark.BARS[mode, metric]
    assert not benchmark.misses([row(OURS, mode, metric, bar)], device)
    (told,) = benchmark.misses([row(OURS, mode, metric, bar + 0.001)], device)
    assert told.startswith(f"{mode}, {OURS}: {metric} is ")


def test_too_much_memory_and_errors_above_the_loops_are_told() -> None:
    rows = [row(OURS, "1x2x3 float32, forward", "backward_extra_of_states", 0.04)]
    rows += [row(who, "1x2x3 float32, forward", "error_states", error) for who, error in ((OURS, 2e-7), ("loop", 1e-7))]
    assert len(benchmark.misses(rows, "cuda")) == 2


def test_every_bar_is_of_something_that_is_measured() -> None:
    modes = {
        Case(shape, dtype, device, training).mode
        for device, problems in benchmark.PROBLEMS.items()
        for shape, dtype in problems
        for training in (False, True)
    }
    modes |= {Layer(benchmark.LONG, "bfloat16", "cuda", False).mode}
    assert {mode for mode, _ in benchmark.BARS} <= modes


def test_what_is_compiled_first_is_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []

    def build(who: str) -> Provider:
        return Provider(lambda: built.append(who) or PROVIDERS[who].build())  # type: ignore[func-returns-value]

    monkeypatch.setattr(benchmark, "PROVIDERS", {who: build(who) for who in ("loop", OURS)})
    benchmark.warm(((1, 8, 2), "float32"), "loop", "cpu")
    assert built == ["loop", "loop"]  # forward, and forward and backward

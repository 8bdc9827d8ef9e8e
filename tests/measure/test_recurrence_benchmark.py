"""What the benchmark of recurrences measures, and what it writes."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import linear_recurrence as benchmark
from benchmarks.recording import Row


@pytest.mark.parametrize("provider", ["doubling", "loop", "structfly"])
def test_every_provider_computes_the_same(provider: str) -> None:
    inputs = benchmark.make_inputs((2, 37, 3), torch.float64, "cpu")
    made = benchmark.step(benchmark.provider(provider), *inputs, training=True)
    found = benchmark.errors(made, benchmark.truth(*inputs))
    assert found.keys() == {"states", "grad_gate", "grad_input"}
    assert max(found.values()) < 1e-12


def test_a_result_has_times_and_errors(tmp_path: Path) -> None:
    output = tmp_path / "result"
    assert benchmark.main(["--device", "cpu", "--shapes", "1x40x3", "--repeats", "2", "--output", str(output)]) == 0
    result = json.loads(output.with_suffix(".json").read_text())
    assert result["command"] == "python -m benchmarks.linear_recurrence --device cpu --shapes 1x40x3 --repeats 2"
    found = {(row["provider"], row["metric"]) for row in result["rows"]}
    assert {(benchmark.FLOOR, "time_s"), ("structfly", "time_s"), ("loop", "error_grad_gate")} <= found


@pytest.mark.parametrize(("seconds", "missed"), [(0.2, 0), (0.3, 1)])
def test_a_missed_bar_is_told(seconds: float, missed: int) -> None:
    mode, other, _ = benchmark.CPU_BAR
    rows = [
        Row.of_value(value, kernel=benchmark.KERNEL, provider=provider, mode=mode, metric="time_s")
        for provider, value in (("structfly", seconds), (other, 1.0))
    ]
    assert len(benchmark.misses(rows)) == missed

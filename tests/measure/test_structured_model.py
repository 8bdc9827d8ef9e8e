"""The benchmark of models of structured layers: what it reads from a trace, and what it trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import structured_layers, structured_model
from benchmarks.device_trace import read_activity, read_kernels
from benchmarks.structured_layers import DENSE
from benchmarks.structured_model import Block, Shape


def trace(*kernels: tuple[float, float, float]) -> dict[str, Any]:
    """Of kernels that begin, end, and whose launches return at these times."""
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name"}]
    for number, (start, end, launched) in enumerate(kernels):
        args = {"correlation": number}
        events.append({"ph": "X", "cat": "cuda_driver", "ts": launched - 2, "dur": 2, "args": args})
        events.append({"ph": "X", "cat": "kernel", "ts": start, "dur": end - start, "args": args})
    return {"traceEvents": events}


def test_gaps_are_the_hosts_where_the_launch_came_late() -> None:
    # The second was queued and begins 1 us after the first; the third is launched 3 us after the second ended.
    found = read_activity(trace((10, 20, 5), (21, 30, 6), (35, 40, 33)))
    assert found.kernels == 3
    times = [found.kernel_seconds, found.span_seconds, found.busy_seconds, found.waiting_seconds]
    assert times == pytest.approx([24e-6, 30e-6, 24e-6, 5e-6])
    assert found.waiting_share == pytest.approx(5 / 30)


def test_kernels_side_by_side_are_busy_once() -> None:
    found = read_activity(trace((10, 20, 5), (12, 15, 6), (18, 25, 7)))
    assert [found.kernel_seconds, found.busy_seconds] == pytest.approx([20e-6, 15e-6])
    assert found.waiting_seconds == 0


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 50), st.integers(0, 60)), min_size=1, max_size=20))
def test_busy_and_waiting_are_parts_of_the_span(drawn: list[tuple[int, int, int]]) -> None:
    found = read_activity(trace(*((start, start + length, start - early) for start, length, early in drawn)))
    covered = {at for start, length, _ in drawn for at in range(start, start + length)}
    assert found.busy_seconds == pytest.approx(len(covered) * 1e-6)
    assert found.busy_seconds + found.waiting_seconds <= found.span_seconds * (1 + 1e-9)


def test_kernels_of_equal_calls_are_told_apart() -> None:
    made = trace((10, 20, 5), (21, 24, 6), (30, 45, 28), (40, 49, 29))  # the last starts early
    for event, name in zip((e for e in made["traceEvents"] if e.get("cat") == "kernel"), "abab", strict=True):
        event["name"] = name
    found = read_kernels(made, 2)
    assert [each.name for each in found] == ["a", "b"]
    assert [each.seconds for each in found] == [pytest.approx((10e-6, 15e-6)), pytest.approx((3e-6, 4e-6))]
    assert [each.name for each in read_kernels(made, 1)] == list("abab")
    for calls in (3, 4):
        with pytest.raises(ValueError, match=f"4 kernels are not those of {calls} equal calls"):
            read_kernels(made, calls)


def test_a_trace_without_kernels_is_refused() -> None:
    with pytest.raises(ValueError, match="no kernels; profile a step that runs on a GPU"):
        read_activity({"traceEvents": []})


@pytest.mark.parametrize(("share", "word"), [(0.05, "GPU"), (0.06, "HOST")])
def test_what_a_step_is_bound_by(share: float, word: str) -> None:
    assert structured_model.bound({"waiting_share": share}) == word
    assert structured_model.bound({}) == ""


def test_the_default_shape_has_224_layers_and_about_a_billion_parameters() -> None:
    chosen = structured_model.parse_arguments([])
    shape = Shape(1, chosen.hidden, chosen.between, 8, "bfloat16")
    with torch.device("meta"):
        block = Block(shape, structured_layers.dense(), structured_layers.Place("meta", torch.bfloat16))
    linears = [module for module in block.modules() if isinstance(module, torch.nn.Linear)]
    assert chosen.blocks * len(linears) == 224
    assert chosen.blocks * sum(each.weight.numel() for each in linears) == pytest.approx(0.9e9, rel=0.02)


# Inductor's workers and Dynamo warn of torch's own deprecations.
@pytest.mark.filterwarnings("ignore")
def test_models_train_with_one_graph_for_all_blocks(tmp_path: Path) -> None:
    sizes = ["--blocks", "2", "--hidden", "64", "--between", "128", "--tokens", "16", "--dtype", "float32"]
    layers = [DENSE, "monarch, 4 blocks", "pixelfly, grid 8, 2 factors, rank 64"]
    output = tmp_path / "models"
    given = ["--device", "cpu", *sizes, "--repeats", "1", "--layers", *layers, "--output", str(output)]
    assert structured_model.main(given) == 0
    rows = json.loads(output.with_name("models.json").read_text())["rows"]
    found = {(row["provider"], row["metric"]): row["p50"] for row in rows}
    for name in layers:
        assert found[name, "graphs"] == 1
        assert found[name, "time_s"] > 0
    dense = 2 * (2 * 64 + 4 * 64 * 64 + 3 * 64 * 128)
    assert found[DENSE, "parameters"] == dense
    assert found["monarch, 4 blocks", "parameters"] < dense


def test_hidden_units_are_whole_heads() -> None:
    with pytest.raises(SystemExit):
        structured_model.parse_arguments(["--hidden", "100"])

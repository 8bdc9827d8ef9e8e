"""The plot of time and memory: it shows the data, and the committed one shows the committed data."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from benchmarks import plot, speedup_plot

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "linear_cross_entropy_h100.json"


def row(mode: str, provider: str, metric: str, p50: float) -> dict[str, object]:
    return {"kernel": "head", "mode": mode, "provider": provider, "metric": metric, "p50": p50}


def result() -> dict[str, object]:
    rows = []
    for mode in ("8x4x16 float32", "9x5x17 float32"):
        for number, provider in enumerate(("eager", "structfly@1MiB", "structfly")):
            rows.append(row(mode, provider, "time_s", 0.001 * (number + 1)))
            rows.append(row(mode, provider, "peak_extra_above_gradients_bytes", 3000.0 - 1000 * number))
        rows.append(row(mode, "three products", "time_s", 0.5))
    return {"device": "a device", "rows": rows}


def test_every_provider_with_time_and_memory_is_a_mark() -> None:
    panels = plot.read_points(result())
    assert [len(points) for points in panels.values()] == [3, 3]
    figure = plot.draw(panels, "a device")
    for axis in figure.axes:
        line, default, eager = axis.lines
        assert line.get_xydata().tolist() == [[3.0, 1000.0], [2.0, 2000.0]]  # type: ignore[union-attr]
        assert default.get_xydata().tolist() == [[3.0, 1000.0]]  # type: ignore[union-attr]
        assert eager.get_xydata().tolist() == [[1.0, 3000.0]]  # type: ignore[union-attr]
    assert [axis.get_title() for axis in figure.axes] == [
        "8 rows, 4 hidden units, 16 classes",
        "9 rows, 5 hidden units, 17 classes",
    ]


def test_a_result_without_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="no mode with time_s"):
        plot.read_points({"rows": [row("8x4x16 float32", "eager", "time_s", 1.0)]})


def test_the_committed_plot_is_that_of_the_committed_data(tmp_path: Path) -> None:
    pinned = re.search(r"^matplotlib==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    if version("matplotlib") != pinned[1]:
        pytest.skip(f"matplotlib {pinned[1]} draws it; another release may place text elsewhere")
    plot.main([str(RESULT), "--output", str(tmp_path / "plot.svg")])
    committed = RESULT.with_suffix(".svg").read_text(encoding="utf-8")
    assert (tmp_path / "plot.svg").read_text(encoding="utf-8") == committed
    providers = {r["provider"] for r in json.loads(RESULT.read_text())["rows"]}
    assert all(name in committed for name in providers - {"three products", "torch.mm"} if "@" not in name)


def speedups() -> dict[str, object]:
    rows = []
    for mode in ("8x4x16 float32, forward", "8x4x16 float32, forward+backward", "9x5x17 float32, forward"):
        for provider, share, found in (
            ("dense", 1.0, 1.0),
            ("monarch, 4 blocks", 0.5, 1.8),
            ("two products", 0.25, 3.0),
        ):
            rows.append(row(mode, provider, "share_of_parameters", share))
            rows.append(row(mode, provider, "x_dense", found))
    return {"device": "a device", "rows": rows}


def test_every_layer_but_the_dense_is_a_mark_of_its_share_and_speed(tmp_path: Path) -> None:
    panels = speedup_plot.read_points(speedups())
    figure = speedup_plot.draw(panels, "a device")
    assert len(figure.axes) == 4  # two shapes, two passes; the second shape has no backward
    for axis, empty in zip(figure.axes, (False, False, False, True), strict=True):
        marks = {str(line.get_label()): line for line in axis.lines if line.get_marker() not in ("None", None)}
        assert set(marks) == (set() if empty else {"monarch, 4 blocks", "two products"})
        for name, place, style in (("monarch, 4 blocks", [0.5, 1.8], "full"), ("two products", [0.25, 3.0], "none")):
            if not empty:
                assert marks[name].get_xydata().tolist() == [place]  # type: ignore[union-attr]
                assert marks[name].get_fillstyle() == style
    result = tmp_path / "speedups.json"
    result.write_text(json.dumps(speedups()), encoding="utf-8")
    plot.main([str(result)])
    assert "times as fast as dense" in result.with_suffix(".svg").read_text(encoding="utf-8")

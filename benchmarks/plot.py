"""Extra memory against time: one panel a shape, one mark a provider, structfly's budgets joined by a line.

    python -m benchmarks.plot benchmarks/results/linear_cross_entropy_h100.json

writes the SVG beside the result.  The same data give the same bytes, with one release of matplotlib.  A result of
structured layers is drawn by :mod:`benchmarks.speedup_plot`, one of recurrences by :mod:`benchmarks.growth_plot`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks import growth_plot, speedup_plot

OURS = "structfly"
_MARKERS = "osD^vP<>Xhp"
_MIB = 2**20
# Without the salt identifiers are random; text stays text, so that the file is small and can be searched.
_SETTINGS: Any = {"svg.hashsalt": OURS, "svg.fonttype": "none", "font.size": 9}


@dataclass(frozen=True)
class Point:
    """What one provider took: median seconds, and peak bytes above inputs and their gradients."""

    provider: str
    seconds: float
    extra_bytes: float

    @property
    def budget(self) -> str:
        """structfly's ``budget.loss_memory``, "" where it was not set and for other providers."""
        return self.provider.partition("@")[2]

    @property
    def ours(self) -> bool:
        return self.provider.partition("@")[0] == OURS


def read_points(result: Mapping[str, object]) -> dict[str, list[Point]]:
    """The points of each mode, in the order they were measured; what has no memory of its own is left out."""
    rows = result["rows"]
    assert isinstance(rows, list)
    medians = {(row["mode"], row["provider"], row["metric"]): float(row["p50"]) for row in rows}
    panels: dict[str, list[Point]] = {}
    for (mode, provider, metric), seconds in medians.items():
        extra = medians.get((mode, provider, "peak_extra_above_gradients_bytes"))
        if metric == "time_s" and extra is not None:
            panels.setdefault(mode, []).append(Point(provider, seconds, extra))
    if not panels:
        raise ValueError("the result has no mode with time_s and peak_extra_above_gradients_bytes of one provider")
    return panels


def draw(panels: Mapping[str, Sequence[Point]], device: str) -> Figure:
    """The figure."""
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(4.1 * len(panels), 4.4), layout="constrained")
        peers = list(dict.fromkeys(p.provider for points in panels.values() for p in points if not p.ours))
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (mode, points) in zip(axes, panels.items(), strict=True):
            _panel(axis, mode, points, peers)
        axes[0].set_ylabel("extra memory")
        conditions = {mode.partition(" ")[2] for mode in panels}
        figure.suptitle("; ".join([device, *sorted(conditions)]), fontsize="medium")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), frameon=False)
        return figure


def _panel(axis: Axes, mode: str, points: Sequence[Point], peers: Sequence[str]) -> None:
    ours = sorted((point for point in points if point.ours), key=lambda point: point.extra_bytes)
    where = [point.seconds * 1e3 for point in ours], [point.extra_bytes for point in ours]
    label = f"{OURS}, by budget (white: its default)"
    axis.plot(*where, "*-", color="black", markersize=9, linewidth=1, zorder=3, label=label)
    for point in ours:
        place = (point.seconds * 1e3, point.extra_bytes)
        axis.annotate(point.budget, place, (-6, -3), textcoords="offset points", ha="right", fontsize="x-small")
        if not point.budget:
            axis.plot(*place, "*", color="white", markersize=4, zorder=4)
    for number, peer in enumerate(peers):
        at = [point for point in points if point.provider == peer]
        marker, color = _MARKERS[number % len(_MARKERS)], f"C{number % 10}"
        times = [point.seconds * 1e3 for point in at]
        axis.plot(times, [point.extra_bytes for point in at], marker, color=color, markersize=6, label=peer)
    rows, hidden, classes = mode.split()[0].split("x")
    axis.set_title(f"{rows} rows, {hidden} hidden units, {classes} classes", fontsize="medium")
    axis.set_xlabel("time of forward and backward, ms")
    axis.set_xlim(left=0)
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _size(value)))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.3)


def _size(count: float) -> str:
    """Bytes as a tick says them."""
    for unit, size in (("GiB", _MIB * 1024), ("MiB", _MIB), ("KiB", 1024)):
        if count >= size:
            return f"{count / size:g} {unit}"
    return f"{count:g} B"


def write_svg(result: Path, output: Path) -> None:
    """Draw the result ``result``, a JSON of :mod:`benchmarks.recording`, to ``output``."""
    data = json.loads(result.read_text(encoding="utf-8"))
    speedups = any(row["metric"] == "x_dense" for row in data["rows"])
    growing = growth_plot.read_points(data)
    with mpl.rc_context(_SETTINGS):
        if growing:
            figure = growth_plot.draw(growing, data["device"])
        elif speedups:
            figure = speedup_plot.draw(speedup_plot.read_points(data), data["device"])
        else:
            figure = draw(read_points(data), data["device"])
        figure.savefig(output, format="svg", metadata={"Date": None, "Creator": None})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("result", type=Path, help="a JSON under benchmarks/results")
    parser.add_argument("--output", type=Path, help="default: the result's name with .svg")
    chosen = parser.parse_args(arguments)
    write_svg(chosen.result, chosen.output or chosen.result.with_suffix(".svg"))


if __name__ == "__main__":
    main()

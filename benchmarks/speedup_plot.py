"""Times as fast as dense against the share of parameters: a panel for each shape and pass, a mark for each provider."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.structured_layers import DENSE, OURS

_MARKERS = "osD^vP<>Xhp"
_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10)


@dataclass(frozen=True)
class Point:
    """One provider's layer: its share of the dense parameters, and how many times as fast as the dense layer it is."""

    provider: str
    share: float
    x_dense: float

    @property
    def ours(self) -> bool:
        return self.provider in OURS


def read_points(result: Mapping[str, object]) -> dict[str, list[Point]]:
    """The points of each mode, in the order they were measured; the dense layer is no point."""
    rows = result["rows"]
    assert isinstance(rows, list)
    medians = {(row["mode"], row["provider"], row["metric"]): float(row["p50"]) for row in rows}
    panels: dict[str, list[Point]] = {}
    for (mode, provider, metric), speedup in medians.items():
        if metric == "x_dense" and provider != DENSE:
            share = medians[mode, provider, "share_of_parameters"]
            panels.setdefault(mode, []).append(Point(provider, share, speedup))
    return panels


def draw(panels: Mapping[str, Sequence[Point]], device: str) -> Figure:
    """The figure; structfly's marks are filled, those of its peers are not."""
    shapes = list(dict.fromkeys(mode.partition(",")[0] for mode in panels))
    passes = list(dict.fromkeys(mode.partition(", ")[2] for mode in panels))
    figure = Figure(figsize=(4.1 * len(shapes), 3.6 * len(passes) + 1.6), layout="constrained")
    axes = figure.subplots(len(passes), len(shapes), squeeze=False)
    providers = list(dict.fromkeys(point.provider for points in panels.values() for point in points))
    lines: dict[str, Line2D] = {}
    for row, of_pass in zip(axes, passes, strict=True):
        for axis, shape in zip(row, shapes, strict=True):
            _panel(axis, panels.get(f"{shape}, {of_pass}", ()), providers)
            axis.set_title(f"{shape}, {of_pass}", fontsize="medium")
            lines |= {str(line.get_label()): line for line in axis.lines}
        row[0].set_ylabel("times as fast as dense")
    for axis in axes[-1]:
        axis.set_xlabel("parameters, of the dense ones")
    figure.suptitle(device, fontsize="medium")
    known = {label: line for label, line in lines.items() if not label.startswith("_")}
    figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=len(shapes), frameon=False)
    return figure


def _panel(axis: Axes, points: Sequence[Point], providers: Sequence[str]) -> None:
    for point in points:
        number = providers.index(point.provider)
        axis.plot(
            point.share,
            point.x_dense,
            _MARKERS[number % len(_MARKERS)],
            color=f"C{number % 10}",
            fillstyle="full" if point.ours else "none",
            label=point.provider,
        )
    shares = [point.share for point in points] or [1.0]
    ends = [min(shares) / 1.3, 1.0]
    axis.plot(ends, [1 / share for share in ends], ":", color="gray", label="as the parameters")
    axis.axhline(1, color="gray", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_yscale("log")
    for of_axis in (axis.xaxis, axis.yaxis):
        of_axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        of_axis.set_minor_formatter(NullFormatter())
    axis.set_yticks(_TICKS)
    axis.set_xticks([tick for tick in _TICKS if tick <= 1])
    axis.grid(alpha=0.3)

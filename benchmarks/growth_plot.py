"""Time against the number of steps: a panel for each pass, a line for each provider."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

_MARKERS = "*osD^v"
PREFIX = "growth, "
"""What the modes begin with, before "BxTxD dtype, passes"."""


@dataclass(frozen=True)
class Point:
    """Median seconds of one provider for so many steps."""

    provider: str
    steps: int
    seconds: float


def read_points(result: Mapping[str, object]) -> dict[str, list[Point]]:
    """The points of each pass, in the order they were measured."""
    rows = result["rows"]
    assert isinstance(rows, list)
    panels: dict[str, list[Point]] = {}
    for row in rows:
        if row["mode"].startswith(PREFIX) and row["metric"] == "time_s":
            sizes, _, passes = row["mode"].removeprefix(PREFIX).partition(" ")
            batch, steps, width = sizes.split("x")
            panel = panels.setdefault(f"{width} channels, batch {batch}, {passes}", [])
            panel.append(Point(row["provider"], int(steps), float(row["p50"])))
    return panels


def draw(panels: Mapping[str, Sequence[Point]], device: str) -> Figure:
    """The figure; both axes are logarithmic, so that what grows linearly is a line along the diagonal."""
    figure = Figure(figsize=(4.6 * len(panels), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    providers = list(dict.fromkeys(point.provider for points in panels.values() for point in points))
    for axis, (title, points) in zip(axes, panels.items(), strict=True):
        for number, provider in enumerate(providers):
            of_it = [point for point in points if point.provider == provider]
            steps, times = [point.steps for point in of_it], [point.seconds * 1e3 for point in of_it]
            if of_it:
                axis.plot(steps, times, f"{_MARKERS[number % len(_MARKERS)]}-", color=f"C{number}", label=provider)
        axis.set_title(title, fontsize="medium")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("steps")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("time, ms")
    figure.suptitle(device, fontsize="medium")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure

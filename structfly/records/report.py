"""What structfly did and did not do, and why: a stable dataclass that reads well when printed."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from structfly.records.layer import OWN_MEASUREMENTS, TimeSource

Status = Literal["rewritten", "kept", "missed", "failed"]


@dataclass(frozen=True)
class SiteReport:
    """One line of the report.

    Attributes:
        rule: name of the rule.
        status: "rewritten", "kept" (matched, but left alone), "missed" (a condition failed) or "failed" (a rule
            raised; the graph was left as it was).
        reason: why, in words.
        name: qualified name of the module or parameter, or "".
        nodes: names of the graph nodes concerned; for a rewritten site those that were replaced.
        source: the user's line, "file:line: code", or "".
        candidate: name of the chosen candidate, or "".
        seconds: predicted time of the chosen candidate, or None.
        seconds_kept: predicted time of leaving the site alone, or None.
        peak_bytes: predicted memory the chosen candidate takes for logits and gradients, or None.
        peak_bytes_kept: the same when the site is left alone, or None.
        loss: how much the loss is predicted to rise by a layer's candidate; None for rewrites that compute the same.
        costs: a layer's amounts of each resource with the chosen candidate: params, flops, weight_bytes, saved_bytes,
            transient_bytes, and time in seconds.
        costs_kept: the same while it is dense.
        time_from: where a layer's time comes from; "" for rewrites that compute the same, whose times are predicted.
        graph: number of the compiled graph it belongs to.
    """

    rule: str
    status: Status
    reason: str
    name: str = ""
    nodes: tuple[str, ...] = ()
    source: str = ""
    candidate: str = ""
    seconds: float | None = None
    seconds_kept: float | None = None
    peak_bytes: int | None = None
    peak_bytes_kept: int | None = None
    loss: float | None = None
    costs: Mapping[str, float] = field(default_factory=dict)
    costs_kept: Mapping[str, float] = field(default_factory=dict)
    time_from: TimeSource | Literal[""] = ""
    graph: int = 0

    @property
    def bytes_saved(self) -> int:
        """Predicted memory a rewrite saves, 0 for sites left alone."""
        if self.status != "rewritten" or self.peak_bytes is None or self.peak_bytes_kept is None:
            return 0
        return self.peak_bytes_kept - self.peak_bytes


@dataclass
class Report:
    """All sites of one compiled function.

    Attributes:
        sites: in graph order.
        graphs: how many graphs the function was compiled to.
        graph_breaks: why it was more than one, where torch said so.
        unmatched_overrides: patterns of the configuration's overrides that match no site's name.
        unmatched_layers: layers of the configuration's plan that are the name of no site.
        pass_seconds: time spent in structfly's own pass, summed over graphs.
    """

    sites: list[SiteReport] = field(default_factory=list)
    graphs: int = 0
    graph_breaks: list[str] = field(default_factory=list)
    unmatched_overrides: list[str] = field(default_factory=list)
    unmatched_layers: list[str] = field(default_factory=list)
    pass_seconds: float = 0.0

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=110, record=True)
        self._render(console)
        return console.export_text().rstrip()

    def _render(self, console: Console) -> None:
        count = {status: sum(site.status == status for site in self.sites) for status in _STYLE}
        console.print(
            f"structfly: {self.graphs} graph{'s' * (self.graphs != 1)}, "
            + ", ".join(f"{number} {status}" for status, number in count.items() if number or status == "rewritten")
            + f"; pass {self.pass_seconds * 1e3:.1f} ms"
        )
        if self.sites:
            table = Table(show_lines=True, expand=True)
            for heading, ratio in (("site", 3), ("status", 1), ("what and why", 6)):
                table.add_column(heading, ratio=ratio, overflow="fold", min_width=9 if heading == "status" else None)
            for site in self.sites:
                where = "\n".join(filter(None, (site.name or ", ".join(site.nodes[:1]), site.rule, site.source)))
                style = _STYLE[site.status]
                table.add_row(escape(where), f"[{style}]{site.status}[/]", escape(_explanation(site)))
            console.print(table)
        for reason in self.graph_breaks:
            console.print(f"graph break: {reason}", markup=False)
        for pattern in self.unmatched_overrides:
            console.print(f"override {pattern!r} matches the name of no site above", markup=False)
        for layer in self.unmatched_layers:
            console.print(f"the plan's layer {layer!r} is the name of no site above", markup=False)
        if any(site.status == "rewritten" and site.rule == "linear" for site in self.sites):
            console.print(_DENSE_WEIGHTS_STAY, markup=False)


_DENSE_WEIGHTS_STAY = (
    "The dense weights of layers restructured here stay in memory, for the model still owns them; "
    "structfly.restructure_(model, ...) removes them."
)
_STYLE = {"rewritten": "green", "kept": "yellow", "missed": "red", "failed": "bold red"}


def _explanation(site: SiteReport) -> str:
    lines = [site.reason]
    if site.candidate:
        lines.append(f"candidate: {site.candidate}")
    if site.status == "rewritten":
        lines.append(f"replaced: {', '.join(site.nodes)}")
    if site.peak_bytes is not None and site.peak_bytes_kept is not None:
        lines.append(f"memory: {format_bytes(site.peak_bytes)}; left alone: {format_bytes(site.peak_bytes_kept)}")
    if site.seconds is not None and site.seconds_kept is not None:
        how = "measured" if site.time_from in OWN_MEASUREMENTS else "predicted"
        lines.append(f"{how} time: {site.seconds * 1e3:.3g} ms; left alone: {site.seconds_kept * 1e3:.3g} ms")
    if site.loss is not None and site.status == "rewritten":
        lines.append(f"predicted loss: {site.loss:+.4g}")
        for name in ("params", "flops", "weight_bytes"):
            lines.append(f"{name}: {site.costs[name]:,.6g}; dense: {site.costs_kept[name]:,.6g}")
    return "\n".join(lines)


def format_bytes(count: float) -> str:
    """A byte count in binary units, three digits."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} GiB"

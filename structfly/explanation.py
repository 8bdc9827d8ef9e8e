"""``structfly.explain``: run a function once and say what structfly does to it, and what not, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from structfly import compat
from structfly.backend import read_config, rewrite, with_inputs
from structfly.config import LayerPlan
from structfly.records import Report


def explain(
    function: Callable[..., Any], *, options: Mapping[str, object] | None = None, mode: str | None = None
) -> Callable[..., Report]:
    """A function that runs ``function`` once, rewritten but not compiled, and returns the report.

    Args:
        function: what would be given to ``torch.compile``; a compiled function or module is unwrapped.
        options, mode: as for ``torch.compile(function, backend="structfly", options=..., mode=...)``.

    The run is a real one: a step that updates parameters updates them.  Nothing that torch.compile has compiled before
    is forgotten.

    Raises:
        ConfigError: an option is unknown or has a wrong value.
        PlanError: the plan that the options name cannot be read.
    """
    config = read_config(options, mode)
    target = compat.original_callable(function)

    def run(*args: Any, **kwargs: Any) -> Report:
        report = Report()

        def collect(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
            outcome = rewrite(gm, config)
            report.sites.extend(replace(site, graph=report.graphs) for site in outcome.sites)
            report.graphs += 1
            report.pass_seconds += outcome.seconds
            return with_inputs(outcome.module.forward, outcome)

        with compat.graph_breaks() as breaks:
            torch.compile(compat.with_code_of_its_own(target), backend=collect)(*args, **kwargs)
        report.graph_breaks.extend(breaks)
        names = {site.name for site in report.sites}
        report.unmatched_overrides.extend(config.unmatched_overrides(names))
        if isinstance(config.plan, LayerPlan):
            report.unmatched_layers.extend(name for name in config.plan.layers if name not in names)
        return report

    return run

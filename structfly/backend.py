"""The torch.compile backend: registered as ``"structfly"`` through the entry-point group ``torch_dynamo_backends``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import fx

from structfly import compat
from structfly.config import Config, LayerPlan, load_config
from structfly.layer_times.known import LayerTimes
from structfly.layer_times.rates import profile_on
from structfly.layer_times.store import keep_times, known_times, origin_on, read_user_times
from structfly.lowering.device_profile import device_profile
from structfly.patterns import LATER_RULES, RULE_NAMES, rules_under
from structfly.patterns.plain_layers import write_out_plain_layers
from structfly.patterns.structures import STRUCTURES
from structfly.restructure.plan import Plan
from structfly.rewriter.engine import Outcome, rewrite_graph
from structfly.rewriter.inputs import UnfitError
from structfly.rewriter.rule import Rule

log = logging.getLogger("structfly")


def structfly(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    options: Mapping[str, object] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Rewrite a Dynamo graph and hand it to Inductor.

    Args:
        gm: the graph.
        example_inputs: its inputs, real or fake.
        options: structfly's configuration; see docs/configuration.md.
        mode: an Inductor mode, as in ``torch.compile(mode=...)``.

    Raises:
        ConfigError: an option is unknown or has a wrong value, or the file of layers' times does; nothing has been
            compiled then.
        PlanError: the plan that the options name cannot be read, or their budget of layers cannot be kept.
        RewriteError: a rule failed and ``strict`` is set.
    """
    config = read_config(options, mode)
    outcome = rewrite(gm, config)
    write_out_plain_layers(outcome.module)
    examples = [*example_inputs, *outcome.examples]
    compiled = compat.compile_with_inductor(outcome.module, examples, config.inductor_options())
    return with_inputs(compiled, outcome, partial(structfly, options=options, mode=mode))


def read_config(options: Mapping[str, object] | None, mode: str | None = None) -> Config:
    """The validated configuration, with the names of rules and structures known, and the plan read.

    Raises:
        ConfigError: an option is unknown or has a wrong value.
        PlanError: the plan's file cannot be read, or holds none.
    """
    config = load_config(options, mode, known_rules=RULE_NAMES, known_structures=STRUCTURES)
    return config.model_copy(update={"plan": Plan.load(config.plan)}) if isinstance(config.plan, Path) else config


def rewrite(gm: fx.GraphModule, config: Config) -> Outcome:
    """Run the rules over a graph, in place; what was measured meanwhile is kept for other graphs and processes.

    Raises:
        ConfigError: layers' times count, and the file that keeps them has something wrong in it.
        PlanError: the budget of layers cannot be kept.
        RewriteError: a rule failed and ``config.strict`` is set.
    """
    # Not at the top: they import triton.
    import structfly.lowering.layer_flops
    import structfly.lowering.linear_cross_entropy.flops
    import structfly.lowering.linear_divergence.flops
    import structfly.lowering.linear_recurrence.flops  # noqa: F401

    planned = config.plan.layers if isinstance(config.plan, LayerPlan) else None
    if planned is not None or not config.budget.counts_time:
        return _by(rules_under(config, planned), gm, config)
    users, found = read_user_times(), list[LayerTimes]()

    @cache
    def times_on(device: torch.device) -> LayerTimes:
        origin = origin_on(device)
        profile, known = profile_on(device, origin, users), known_times(origin, users)
        found.append(LayerTimes(device, profile, known, seconds=config.timing_seconds))
        return found[-1]

    try:
        return _by(rules_under(config, times=times_on), gm, config)
    finally:
        keep_times(entry for times in found for entry in times.entries())


def _by(rules: Sequence[Rule[Any]], gm: fx.GraphModule, config: Config) -> Outcome:
    """What rules do to a graph, and to what they made of it those that come later."""
    first = rewrite_graph(gm, rules, config, device_profile)
    later = rewrite_graph(first.module, LATER_RULES, config, device_profile)
    return replace(
        first,
        sites=[*first.sites, *later.sites],
        changed=first.changed or later.changed,
        seconds=first.seconds + later.seconds,
    )


def with_inputs(
    function: Callable[..., Any], outcome: Outcome, backend: Callable[..., Any] | str = "eager"
) -> Callable[..., Any]:
    """``function`` with the inputs that rewrites added supplied before every call.

    Where they do not hold for a call's arguments, the graph as it was is compiled by ``backend``, a backend of
    torch.compile, and run instead.
    """
    if not outcome.inputs:
        return function
    providers, otherwise = [extra.provide for extra in outcome.inputs], _Otherwise(outcome, backend)

    def call(*arguments: Any) -> Any:
        try:
            added = [each for provide in providers for each in provide(arguments)]
        except UnfitError as error:
            return otherwise(error, arguments)
        return function(*arguments, *added)

    return call


class _Otherwise:
    """The graph as it was, compiled when it is first needed."""

    def __init__(self, outcome: Outcome, backend: Callable[..., Any] | str) -> None:
        self.original, self.backend = outcome.original, backend
        self.compiled: Callable[..., Any] | None = None

    def __call__(self, error: UnfitError, arguments: tuple[Any, ...]) -> Any:
        if self.original is None:  # of a site that was not said to be conditional
            raise error
        if self.compiled is None:
            log.warning("%s: the graph is compiled once more, without what was recognised there", error)
            self.compiled = torch.compile(compat.with_code_of_its_own(self.original), backend=self.backend)
        return self.compiled(*arguments)

"""What structfly recognises: one package per pattern.  The default rules are one explicit, ordered tuple."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from structfly.config import Config
from structfly.patterns.batched_chain import BatchedChain
from structfly.patterns.factored_linear import FactoredLinear
from structfly.patterns.layer_epilogue import LayerEpilogue
from structfly.patterns.linear import RestructuredLinear
from structfly.patterns.linear.menu import Planned
from structfly.patterns.linear.times import Times as LayerTimes
from structfly.patterns.linear_cross_entropy import LinearCrossEntropy
from structfly.patterns.linear_divergence import LinearDivergence
from structfly.patterns.linear_recurrence import CumulativeRecurrence, LinearRecurrence
from structfly.patterns.masked_linear import MaskedLinear
from structfly.patterns.merged_linear import MergedLinear
from structfly.patterns.merged_linear.rule import Times as OpTimes
from structfly.patterns.projected_recurrence import ProjectedRecurrence
from structfly.rewriter.rule import Rule

DEFAULT_RULES: tuple[Rule[Any], ...] = (
    LinearCrossEntropy(),
    LinearDivergence(),
    LinearRecurrence(),
    FactoredLinear(),
    MaskedLinear(),
    BatchedChain(),
)
LATER_RULES: tuple[Rule[Any], ...] = (LayerEpilogue(), ProjectedRecurrence())
"""Those that read what the others wrote."""
RULE_NAMES = (
    *(rule.name for rule in (*DEFAULT_RULES, *LATER_RULES)),
    CumulativeRecurrence.name,
    MergedLinear.name,
    RestructuredLinear.name,
)


class AllTimes(LayerTimes, OpTimes, Protocol):
    """Times of layers on one device, by their structure and as their ops have them."""


def rules_under(
    config: Config,
    plan: Mapping[str, Planned] | None = None,
    times: Callable[[torch.device], AllTimes] | None = None,
) -> tuple[Rule[Any], ...]:
    """The rules that may act: the exact ones; the one that is off unless ``config`` names it; and last, so that it
    takes nothing from them, the one that restructures layers, where ``config`` asks for that.  Structured layers are
    merged, which takes memory, where time counts and nothing limits that.

    Args:
        plan: says what of which layer becomes, or None where a budget does.
        times: gives the times of layers on a device, where they count.
    """
    rules = (*DEFAULT_RULES, CumulativeRecurrence())
    if not config.restructures:
        return rules
    may_grow = config.budget.params is None and config.budget.weight_bytes is None
    merged = (MergedLinear(times),) if times is not None and may_grow else ()
    return (*rules, *merged, RestructuredLinear(plan, times))


__all__ = [
    "DEFAULT_RULES",
    "LATER_RULES",
    "RULE_NAMES",
    "BatchedChain",
    "CumulativeRecurrence",
    "FactoredLinear",
    "LayerEpilogue",
    "LinearCrossEntropy",
    "LinearDivergence",
    "LinearRecurrence",
    "MaskedLinear",
    "MergedLinear",
    "ProjectedRecurrence",
    "RestructuredLinear",
    "rules_under",
]

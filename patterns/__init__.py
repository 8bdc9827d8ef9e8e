"""What structfly recognises: one package per pattern.  The default rules are one explicit, ordered tuple."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from structfly.config import Config
from structfly.patterns.linear import RestructuredLinear
from structfly.patterns.linear.menu import Planned
from structfly.patterns.linear_cross_entropy import LinearCrossEntropy
from structfly.patterns.linear_divergence import LinearDivergence
from structfly.patterns.linear_recurrence import LinearRecurrence
from structfly.rewriter.rule import Rule

DEFAULT_RULES: tuple[Rule[Any], ...] = (LinearCrossEntropy(), LinearDivergence(), LinearRecurrence())
RULE_NAMES = (*(rule.name for rule in DEFAULT_RULES), RestructuredLinear.name)


def rules_under(config: Config, plan: Mapping[str, Planned] | None = None) -> tuple[Rule[Any], ...]:
    """The rules that may act: the exact ones, and last, so that it takes nothing from them, the one that restructures
    layers, where ``config`` asks for that; ``plan`` says what of which layer becomes, or None where a budget does."""
    return (*DEFAULT_RULES, RestructuredLinear(plan)) if config.restructures else DEFAULT_RULES


__all__ = [
    "DEFAULT_RULES",
    "RULE_NAMES",
    "LinearCrossEntropy",
    "LinearDivergence",
    "LinearRecurrence",
    "RestructuredLinear",
    "rules_under",
]

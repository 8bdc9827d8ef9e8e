"""What structfly recognises: one package per pattern.  The default rules are one explicit, ordered tuple."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from structfly.config import Config
from structfly.patterns.linear import RestructuredLinear
from structfly.patterns.linear.menu import Planned
from structfly.patterns.linear.times import Times
from structfly.patterns.linear_cross_entropy import LinearCrossEntropy
from structfly.patterns.linear_divergence import LinearDivergence
from structfly.rewriter.rule import Rule

DEFAULT_RULES: tuple[Rule[Any], ...] = (LinearCrossEntropy(), LinearDivergence())
RULE_NAMES = (*(rule.name for rule in DEFAULT_RULES), RestructuredLinear.name)


def rules_under(
    config: Config,
    plan: Mapping[str, Planned] | None = None,
    times: Callable[[torch.device], Times] | None = None,
) -> tuple[Rule[Any], ...]:
    """The rules that may act: the exact ones, and last, so that it takes nothing from them, the one that restructures
    layers, where ``config`` asks for that.

    Args:
        plan: says what of which layer becomes, or None where a budget does.
        times: gives the times of layers on a device, where they count.
    """
    return (*DEFAULT_RULES, RestructuredLinear(plan, times)) if config.restructures else DEFAULT_RULES


__all__ = ["DEFAULT_RULES", "RULE_NAMES", "LinearCrossEntropy", "LinearDivergence", "RestructuredLinear", "rules_under"]

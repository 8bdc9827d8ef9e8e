"""What structfly recognises: one package per pattern.  The default rules are one explicit, ordered tuple."""

from __future__ import annotations

from typing import Any

from structfly.patterns.linear_cross_entropy import LinearCrossEntropy
from structfly.patterns.linear_divergence import LinearDivergence
from structfly.rewriter.rule import Rule

DEFAULT_RULES: tuple[Rule[Any], ...] = (LinearCrossEntropy(), LinearDivergence())

__all__ = ["DEFAULT_RULES", "LinearCrossEntropy", "LinearDivergence"]

"""Which of several weights is nearest to a given one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from structfly.records.layer import LayerStatistics

_Fit = TypeVar("_Fit")


def nearest(
    weight: Tensor, statistics: LayerStatistics, dense: Callable[[_Fit], Tensor], first: _Fit, *others: _Fit
) -> _Fit:
    """Of the fits the one whose ``dense`` weight (out, in) costs least in place of ``weight``; of equals the first."""
    return min((first, *others), key=lambda fit: statistics.loss_of(dense(fit) - weight))

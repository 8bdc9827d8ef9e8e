"""What one layer may become: every structure's menu, with predicted losses and costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from structfly.patterns.structure import Structure, widened
from structfly.records.layer import NO_STATISTICS, LayerCost, LayerSizes, LayerStatistics
from structfly.rewriter.layer_costs import Costs, dense_cost


@dataclass(frozen=True)
class Candidate:
    """One thing a layer may become: a :class:`~structfly.records.LayerCandidate`.

    Attributes:
        structure: what its weight is made of, None for the dense weight.
        loss: how much the loss is predicted to rise.
        costs: its amounts of each resource.
    """

    structure: Structure | None
    loss: float
    costs: Costs = field(repr=False)

    @property
    def name(self) -> str:
        """Shown in reports."""
        return "dense" if self.structure is None else f"{self.structure!r}"

    @property
    def rewrites(self) -> bool:
        """False for the dense weight."""
        return self.structure is not None


Losses = Callable[[type[Structure], Sequence[Structure]], Iterable[float]]
"""Of settings of a structure: the loss that each is predicted to cost a layer."""


def losses_of(weight: Tensor, statistics: LayerStatistics = NO_STATISTICS) -> Losses:
    """Those of a weight (out, in) with these statistics."""
    wide = widened(weight.detach())
    return lambda structure, menu: structure.losses(menu, wide, statistics)


def candidates_of(
    sizes: LayerSizes,
    dtype: torch.dtype,
    structures: Sequence[type[Structure]],
    losses: Losses,
    amounts: Callable[[LayerCost], Costs],
    time_of: Callable[[Structure | None, float], float] = lambda _, predicted: predicted,
) -> list[Candidate]:
    """The dense weight first, then what the structures offer; what another candidate is better than in every respect
    is left out.

    Args:
        sizes: of the layer.
        dtype: of the weight, or the factors, when they are multiplied by.
        structures: those to offer.
        losses: of the layer.
        amounts: of a cost, under the conditions that hold.
        time_of: the time of a structure, None for the dense weight, of which the roofline predicts the given one.
    """

    def candidate(structure: Structure | None, loss: float, cost: LayerCost) -> Candidate:
        costs = amounts(cost)
        return Candidate(structure, loss, {**costs, "time": time_of(structure, costs["time"])})

    found = [candidate(None, 0.0, dense_cost(sizes, dtype))]
    for structure in structures:
        menu = [each for each in structure.menu(sizes) if not each.why_not(sizes)]
        for each, loss in zip(menu, losses(structure, menu), strict=True):
            found.append(candidate(each, max(0.0, loss), each.cost(sizes, dtype)))
    return _undominated(found)


def _undominated(candidates: Sequence[Candidate]) -> list[Candidate]:
    def amounts(each: Candidate) -> tuple[float, ...]:
        return (each.loss, *each.costs.values())

    kept: list[Candidate] = []
    for each in sorted(candidates, key=amounts):
        mine = amounts(each)
        if not any(all(a <= b for a, b in zip(amounts(other), mine, strict=True)) for other in kept):
            kept.append(each)
    dense = [each for each in candidates if each.structure is None]
    return [*dense, *(each for each in kept if each.structure is not None)]

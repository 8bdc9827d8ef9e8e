"""What each layer may become: every structure's menu, with predicted losses and costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from structfly.patterns.structure import Structure
from structfly.records.layer import NO_STATISTICS, LayerCost, LayerStatistics
from structfly.restructure.costs import Conditions, Costs, dense_cost
from structfly.restructure.layers import Layer


@dataclass(frozen=True)
class Candidate:
    """One thing a layer may become.

    Attributes:
        structure: what its weight is made of, None for the dense weight.
        loss: how much the loss is predicted to rise.
        costs: its amounts of each resource.
    """

    structure: Structure | None
    loss: float
    costs: Costs = field(repr=False)


def candidates_of(
    layer: Layer,
    structures: Sequence[type[Structure]],
    conditions: Conditions,
    statistics: LayerStatistics = NO_STATISTICS,
    time_of: Callable[[Structure | None, float], float] = lambda _, predicted: predicted,
) -> list[Candidate]:
    """The dense weight first, then what the structures offer; what another candidate is better than in every respect
    is left out.

    Args:
        time_of: the time of a structure, None for the dense weight, of which the roofline predicts the given one.
    """
    weight = layer.weight.detach()
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))

    def candidate(structure: Structure | None, loss: float, cost: LayerCost) -> Candidate:
        costs = conditions.amounts(cost)
        return Candidate(structure, loss, {**costs, "time": time_of(structure, costs["time"])})

    found = [candidate(None, 0.0, dense_cost(layer.sizes, weight.dtype))]
    for structure in structures:
        menu = [each for each in structure.menu(layer.sizes) if not each.why_not(layer.sizes)]
        for each, loss in zip(menu, structure.losses(menu, wide, statistics), strict=True):
            found.append(candidate(each, max(0.0, loss), each.cost(layer.sizes, weight.dtype)))
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

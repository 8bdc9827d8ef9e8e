"""What one layer may become: every structure's menu, with predicted losses and costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from structfly.patterns.structure import Structure, widened
from structfly.records.layer import NO_STATISTICS, LayerCost, LayerSeconds, LayerSizes, LayerStatistics, TimeSource
from structfly.rewriter.layer_costs import Costs, dense_cost


@dataclass(frozen=True)
class Candidate:
    """One thing a layer may become: a :class:`~structfly.records.LayerCandidate`.

    Attributes:
        structure: what its weight is made of, None for the dense weight.
        loss: how much the loss is predicted to rise.
        costs: its amounts of each resource.
        time_from: where the time among them comes from.
    """

    structure: Structure | None
    loss: float
    costs: Costs = field(repr=False)
    time_from: TimeSource = "roofline"

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


def offered(
    sizes: LayerSizes,
    dtype: torch.dtype,
    structures: Sequence[type[Structure]],
    losses: Losses,
    amounts: Callable[[LayerCost], Costs],
) -> list[Candidate]:
    """The dense weight first, then all that the structures offer, with the roofline's times.

    Args:
        sizes: of the layer.
        dtype: of the weight, or the factors, when they are multiplied by.
        structures: those to offer.
        losses: of the layer.
        amounts: of a cost, under the conditions that hold.
    """
    found = [Candidate(None, 0.0, amounts(dense_cost(sizes, dtype)))]
    for structure in structures:
        menu = [each for each in structure.menu(sizes) if not each.why_not(sizes)]
        for each, loss in zip(menu, losses(structure, menu), strict=True):
            found.append(Candidate(each, max(0.0, loss), amounts(each.cost(sizes, dtype))))
    return found


def timed(candidates: Iterable[Candidate], time_of: Callable[[Candidate], LayerSeconds]) -> list[Candidate]:
    """The candidates with these times."""
    found = []
    for each in candidates:
        seconds, source = time_of(each)
        found.append(replace(each, costs={**each.costs, "time": seconds}, time_from=source))
    return found


def undominated(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The dense weight first, then the others without what another one is better than in every respect."""

    def amounts(each: Candidate) -> tuple[float, ...]:
        return (each.loss, *each.costs.values())

    kept: list[Candidate] = []
    for each in sorted(candidates, key=amounts):
        mine = amounts(each)
        if not any(all(a <= b for a, b in zip(amounts(other), mine, strict=True)) for other in kept):
            kept.append(each)
    dense = [each for each in candidates if each.structure is None]
    return [*dense, *(each for each in kept if each.structure is not None)]

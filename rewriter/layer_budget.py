"""What layers become under limits that hold for all of them together: the least loss, or the least time; proven."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from structfly.errors import PlanError
from structfly.records import LayerCandidate
from structfly.records.layer import OWN_MEASUREMENTS
from structfly.rewriter.layer_costs import ACTIVATIONS, added, used
from structfly.rewriter.solver import ImpossibleError, Option, Solution, solve

Menus = Sequence[Sequence[LayerCandidate]]
CandidateT = TypeVar("CandidateT", bound=LayerCandidate)


def measured_slower(candidate: LayerCandidate, menu: Sequence[LayerCandidate]) -> bool:
    """Whether a candidate was measured to take longer than the dense weight on the same menu."""
    dense = next(each for each in menu if not each.rewrites)
    return candidate.time_from in OWN_MEASUREMENTS and candidate.costs["time"] > dense.costs["time"]


def without_slower(menu: Sequence[CandidateT]) -> list[CandidateT]:
    """What is left where time counts: no candidate that was measured to take longer than the dense weight."""
    return [each for each in menu if not measured_slower(each, menu)]


def dense_totals(menus: Menus, resources: Sequence[str]) -> dict[str, float]:
    """What the layers cost together while they are dense."""
    dense = [next(each for each in menu if not each.rewrites).costs for menu in menus]
    return {resource: used(dense, resource) for resource in resources}


def allocate(menus: Menus, limits: Mapping[str, float], loss: float | None) -> Solution:
    """A candidate of each layer: the least predicted loss within the limits, or with ``loss`` the least time.

    Args:
        menus: of each layer.
        limits: the most that the layers may use of each resource together.
        loss: the most that the predicted loss may rise, or None where it is what is minimised.

    Raises:
        PlanError: no choice keeps the limits; the message says what is possible.
    """
    bounds = dict(limits) if loss is None else {**limits, "loss": loss}

    def option(each: LayerCandidate) -> Option:
        uses = {resource: added(each.costs, resource) for resource in limits}
        if loss is not None:
            uses["loss"] = each.loss
        return Option(each.loss if loss is None else each.costs["time"], uses, each.costs["transient_bytes"])

    try:
        return solve([[option(each) for each in menu] for menu in menus], limits=bounds, peak_counts_as=ACTIVATIONS)
    except ImpossibleError as error:
        raise PlanError(_impossible(error, bounds)) from None


def _impossible(error: ImpossibleError, limits: Mapping[str, float]) -> str:
    lines = [f"{name} {limit:,.6g} (least possible alone: {error.alone[name]:,.6g})" for name, limit in limits.items()]
    together = f"; together they can be kept at {error.factor:.4g} times these limits" if len(limits) > 1 else ""
    return f"no choice of structures keeps the budget: {', '.join(lines)}{together}; raise it, or offer more structures"

"""Which candidate each layer becomes: the global solver, and named rules to compare it with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from structfly.config.budget import Budget
from structfly.errors import PlanError
from structfly.restructure.candidates import Candidate
from structfly.rewriter.solver import ImpossibleError, Option, Solution, solve

Candidates = Mapping[str, Sequence[Candidate]]
ACTIVATIONS = "activation_bytes"


class Allocation(NamedTuple):
    """The choice, by layer, and what is proven of it: None where a rule proves nothing."""

    chosen: dict[str, Candidate]
    bound: float | None = None
    gap: float | None = None


def amount(candidate: Candidate, resource: str) -> float:
    """What a candidate uses of a resource; of activations what it keeps for backward."""
    return candidate.costs["saved_bytes" if resource == ACTIVATIONS else resource]


def dense_totals(candidates: Candidates, resources: Sequence[str]) -> dict[str, float]:
    """What the layers cost together while they are dense."""
    dense = [_dense(menu) for menu in candidates.values()]
    totals = {resource: sum(amount(each, resource) for each in dense) for resource in resources}
    if ACTIVATIONS in totals:
        totals[ACTIVATIONS] += max(each.costs["transient_bytes"] for each in dense)
    return totals


def by_solver(candidates: Candidates, budget: Budget, limits: Mapping[str, float]) -> Allocation:
    """The least predicted loss within the limits, or with ``budget.loss`` the least time; proven.

    Raises:
        PlanError: no choice keeps the budget; the message says what is possible.
    """
    seeks_time = budget.loss is not None
    bounds = {**limits, "loss": budget.loss} if budget.loss is not None else dict(limits)

    def option(each: Candidate) -> Option:
        uses = {resource: amount(each, resource) for resource in limits}
        if seeks_time:
            uses["loss"] = each.loss
        return Option(each.costs["time"] if seeks_time else each.loss, uses, each.costs["transient_bytes"])

    sites = [[option(each) for each in menu] for menu in candidates.values()]
    try:
        solution: Solution = solve(sites, limits=bounds, peak_counts_as=ACTIVATIONS)
    except ImpossibleError as error:
        raise PlanError(_impossible(error, bounds)) from None
    chosen = {name: menu[n] for (name, menu), n in zip(candidates.items(), solution.chosen, strict=True)}
    return Allocation(chosen, solution.bound, solution.gap)


def uniform(candidates: Candidates, budget: Budget, limits: Mapping[str, float]) -> Allocation:
    """Every layer to the same share of its parameters, or of the first limit's resource: the largest share that keeps
    all limits, each layer taking its candidate of least loss within it.

    Raises:
        PlanError: no share keeps the limits.
    """
    resource = next(iter(limits), "params")

    def at(share: float) -> dict[str, Candidate] | None:
        chosen = {}
        for name, menu in candidates.items():
            dense = amount(_dense(menu), resource)
            fitting = [each for each in menu if amount(each, resource) <= share * dense * (1 + 1e-12)]
            if not fitting:
                return None
            chosen[name] = min(fitting, key=lambda each: (each.loss, amount(each, resource)))
        return chosen

    shares = sorted(
        {
            amount(each, resource) / max(amount(_dense(menu), resource), 1e-300)
            for menu in candidates.values()
            for each in menu
        },
        reverse=True,
    )
    for share in shares:
        chosen = at(share)
        if chosen is not None and keeps(chosen, limits):
            return Allocation(chosen)
    raise PlanError(f"no share of {resource} that is the same for all layers keeps the budget")


def by_pixelfly(candidates: Candidates, budget: Budget, limits: Mapping[str, float]) -> Allocation:
    """Pixelated Butterfly's rule (Dao et al., arXiv 2112.00029): every layer is a Pixelfly and gets of the budget the
    share that it has of the dense compute; its menu gives 1/4 to 1/3 of that to the low-rank part.

    Raises:
        PlanError: no Pixelfly is offered to a layer, or none fits its share.
    """
    dense = {name: _dense(menu).costs["flops"] for name, menu in candidates.items()}
    chosen = {}
    for name, menu in _only("pixelfly", candidates).items():
        share = {resource: limit * dense[name] / sum(dense.values()) for resource, limit in limits.items()}
        fitting = [each for each in menu if all(amount(each, r) <= limit * (1 + 1e-12) for r, limit in share.items())]
        if not fitting:
            raise PlanError(f"no Pixelfly of {name!r} fits its share of the budget, {share}; raise the budget")
        chosen[name] = min(fitting, key=lambda each: each.loss)
    return Allocation(chosen)


def by_threshold(candidates: Candidates, budget: Budget, limits: Mapping[str, float]) -> Allocation:
    """The rule that GBLR's learned widths follow (Lee and Kim 2024): every layer is a GBLR, and one threshold for all
    layers says from which loss a parameter on it is kept; it is the smallest that keeps the budget.

    Raises:
        PlanError: no GBLR is offered to a layer, or no threshold keeps the budget.
    """
    menus = _only("gblr", candidates)

    def at(threshold: float) -> dict[str, Candidate]:
        return {
            name: min(menu, key=lambda each: (each.loss + threshold * each.costs["params"], each.costs["params"]))
            for name, menu in menus.items()
        }

    low, high = 0.0, 1e-30
    while not keeps(at(high), limits):
        low, high = high, high * 10
        if high > 1e30:
            raise PlanError("no GBLR that is offered keeps the budget; raise it")
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if keeps(at(middle), limits) else (middle, high)
    return Allocation(at(high))


def keeps(chosen: Mapping[str, Candidate], limits: Mapping[str, float]) -> bool:
    """Whether the choice keeps all limits."""
    for resource, limit in limits.items():
        used = sum(amount(each, resource) for each in chosen.values())
        if resource == ACTIVATIONS:
            used += max(each.costs["transient_bytes"] for each in chosen.values())
        if used > limit * (1 + 1e-12):
            return False
    return True


STRATEGIES: Mapping[str, Callable[[Candidates, Budget, Mapping[str, float]], Allocation]] = {
    "solver": by_solver,
    "uniform": uniform,
    "pixelfly": by_pixelfly,
    "gblr": by_threshold,
}


def _dense(menu: Sequence[Candidate]) -> Candidate:
    return next(each for each in menu if each.structure is None)


def _only(structure: str, candidates: Candidates) -> dict[str, list[Candidate]]:
    """Each layer's candidates of one structure."""
    found = {
        name: [each for each in menu if each.structure is not None and each.structure.name == structure]
        for name, menu in candidates.items()
    }
    for name, menu in found.items():
        if not menu:
            raise PlanError(f"the strategy needs {structure!r}, which {name!r} is not offered; name it in structures")
    return found


def _impossible(error: ImpossibleError, limits: Mapping[str, float]) -> str:
    lines = [f"{name} {limit:,.6g} (least possible alone: {error.alone[name]:,.6g})" for name, limit in limits.items()]
    together = f"; together they can be kept at {error.factor:.4g} times these limits" if len(limits) > 1 else ""
    return f"no choice of structures keeps the budget: {', '.join(lines)}{together}; raise it, or offer more structures"

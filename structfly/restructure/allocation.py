"""Which candidate each layer becomes: the global solver, and named rules to compare it with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from structfly.config.budget import Budget
from structfly.errors import ArgumentError, PlanError
from structfly.patterns.linear.candidates import Candidate
from structfly.rewriter.layer_budget import allocate
from structfly.rewriter.layer_costs import added, keeps

Candidates = Mapping[str, Sequence[Candidate]]


class Allocation(NamedTuple):
    """The choice, by layer, and what is proven of it: None where a rule proves nothing."""

    chosen: dict[str, Candidate]
    bound: float | None = None
    gap: float | None = None


def by_solver(candidates: Candidates, budget: Budget, limits: Mapping[str, float]) -> Allocation:
    """The least predicted loss within the limits, or with ``budget.loss`` the least time; proven.

    Raises:
        PlanError: no choice keeps the budget; the message says what is possible.
    """
    solution = allocate(list(candidates.values()), limits, budget.loss)
    chosen = {name: menu[n] for (name, menu), n in zip(candidates.items(), solution.chosen, strict=True)}
    return Allocation(chosen, solution.bound, solution.gap)


def uniform(candidates: Candidates, budget: Budget, limits: Mapping[str, float]) -> Allocation:
    """Every layer to the same share of its parameters, or of the first limit's resource: the largest share that keeps
    all limits, each layer taking its candidate of least loss within it.

    Raises:
        PlanError: no share keeps the limits.
    """
    resource = next(iter(limits))
    dense = {name: added(_dense(menu).costs, resource) for name, menu in candidates.items()}

    def at(share: float) -> dict[str, Candidate] | None:
        chosen = {}
        for name, menu in candidates.items():
            fitting = [each for each in menu if added(each.costs, resource) <= share * dense[name] * (1 + 1e-12)]
            if not fitting:
                return None
            chosen[name] = min(fitting, key=lambda each: (each.loss, added(each.costs, resource)))
        return chosen

    pairs = [(added(each.costs, resource), dense[name]) for name, menu in candidates.items() for each in menu]
    for share in sorted({mine / max(whole, 1e-300) for mine, whole in pairs}, reverse=True):
        chosen = at(share)
        if chosen is not None and _keeps(chosen, limits):
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
        fitting = [each for each in menu if keeps([each.costs], share)]
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
    while not _keeps(at(high), limits):
        low, high = high, high * 10
        if high > 1e30:
            raise PlanError("no GBLR that is offered keeps the budget; raise it")
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if _keeps(at(middle), limits) else (middle, high)
    return Allocation(at(high))


STRATEGIES: Mapping[str, Callable[[Candidates, Budget, Mapping[str, float]], Allocation]] = {
    "solver": by_solver,
    "uniform": uniform,
    "pixelfly": by_pixelfly,
    "gblr": by_threshold,
}


def check_strategy(strategy: str, budget: Budget) -> None:
    """Raise ArgumentError if there is no such strategy, or if it does not seek what ``budget`` does."""
    if strategy not in STRATEGIES:
        raise ArgumentError(f"strategy is {strategy!r}; allowed: {', '.join(STRATEGIES)}")
    if strategy != "solver" and budget.loss is not None:
        raise ArgumentError(f"the strategy {strategy!r} cannot seek the least time; leave budget.loss out")


def _keeps(chosen: Mapping[str, Candidate], limits: Mapping[str, float]) -> bool:
    return keeps((each.costs for each in chosen.values()), limits)


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

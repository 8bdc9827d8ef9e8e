"""From the menus of a graph's linear layers to choices, all under one budget, with a reason in words for each.

Layers share no limit with the sites that :mod:`~structfly.rewriter.choosing` chooses for, whose rewrites compute the
same function, so that neither pays for the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from structfly.config.budget import Limits
from structfly.errors import PlanError
from structfly.records import LayerCandidate, LayerMenu
from structfly.records.layer import OWN_MEASUREMENTS
from structfly.rewriter.layer_budget import allocate, dense_totals, measured_slower


@dataclass(frozen=True)
class LayerOrder:
    """A layer with what it is chosen from.

    Attributes:
        name: its qualified name.
        menu: what there is.
        always: choose among the structures only, where there are any (``rewrite="always"``).
    """

    name: str
    menu: LayerMenu
    always: bool


@dataclass(frozen=True)
class LayerChoice:
    """The choice for one layer.

    Attributes:
        candidate: the chosen one.
        dense: the dense weight.
        reason: why this one.
    """

    candidate: LayerCandidate
    dense: LayerCandidate
    reason: str


# A round solves once, which the limit on the time of measuring does not count.
_ROUNDS = 20


def choose_layers(orders: Sequence[LayerOrder], budget: Limits) -> list[LayerChoice]:
    """Minimise the predicted loss of all layers together within the budget, or with ``budget.loss`` their time.

    A ratio is of what these layers cost while they are dense, those that are settled left out.  A layer is restructured
    where the budget asks for it, and nowhere else: dense, it costs no loss.

    Where time counts, no candidate is chosen that was measured to be slower than the dense weight, and what is chosen
    is timed and chosen again until all of it has been timed, or no more may be.

    Raises:
        PlanError: no choice keeps the budget; the message says what is possible.
    """
    for _ in range(_ROUNDS):
        choices = _choices(orders, budget)
        new = [_measures(order, choice) for order, choice in zip(orders, choices, strict=True)]
        if not any(new):
            return choices
        orders = [_with_times(order) for order in orders]
    return _choices(orders, budget)


def _measures(order: LayerOrder, choice: LayerChoice) -> bool:
    timing = order.menu.timing
    return timing is not None and choice.candidate.rewrites and timing.measure(choice.candidate)


def _with_times(order: LayerOrder) -> LayerOrder:
    return order if order.menu.timing is None else replace(order, menu=order.menu.timing.menu())


def _choices(orders: Sequence[LayerOrder], budget: Limits) -> list[LayerChoice]:
    free = [order for order in orders if not order.menu.settled]
    menus = [_eligible(order, budget) for order in free]
    totals = dense_totals([order.menu.candidates for order in free], list(budget.limits))
    limits = {resource: limit.of(totals[resource]) for resource, limit in budget.limits.items()}
    try:
        solution = allocate(menus, limits, budget.loss)
    except PlanError as error:
        raise PlanError(
            f"{error}{_left_out(free, budget)}.  The budget holds for the layers of each compiled graph, in this one "
            f"{_listed(free)}; switch the rule linear off for a layer to leave it out of the budget"
        ) from None
    proven = "proven best" if solution.gap == 0 else f"within {solution.gap:.2g} of the bound"
    layers = "the one layer" if len(free) == 1 else f"the {len(free)} layers"
    aim = f"{_aim(limits, totals, budget)}, {proven} for {layers} of this graph"
    picked = iter([menu[number] for menu, number in zip(menus, solution.chosen, strict=True)])
    return [
        LayerChoice(order.menu.candidates[-1], _dense(order), order.menu.settled)
        if order.menu.settled
        else _explained(order, next(picked), aim, budget)
        for order in orders
    ]


def _eligible(order: LayerOrder, budget: Limits) -> list[LayerCandidate]:
    slower = _slower(order, budget)
    left = [each for each in order.menu.candidates if each not in slower]
    structured = [each for each in left if each.rewrites]
    return structured if order.always and structured else left


def _slower(order: LayerOrder, budget: Limits) -> list[LayerCandidate]:
    """What may not be chosen, for it was measured to be slower than the dense weight."""
    if order.always or not budget.counts_time:
        return []
    return [each for each in order.menu.candidates if measured_slower(each, order.menu.candidates)]


def _left_out(orders: Sequence[LayerOrder], budget: Limits) -> str:
    slower = sum(len(_slower(order, budget)) for order in orders)
    count = sum(len(order.menu.candidates) for order in orders)
    return f"; left out, for they were measured slower than dense: {slower} of {count} candidates" if slower else ""


def _dense(order: LayerOrder) -> LayerCandidate:
    return next(each for each in order.menu.candidates if not each.rewrites)


def _explained(order: LayerOrder, chosen: LayerCandidate, aim: str, budget: Limits) -> LayerChoice:
    dense, left_out = _dense(order), _left_out([order], budget)
    if len(order.menu.candidates) == 1:
        reason = "no structure is offered here that has fewer parameters than the dense weight"
    elif not chosen.rewrites:
        reason = f"left dense: {aim}; {order.menu.basis}{left_out}"
    else:
        how = "measured" if chosen.time_from in OWN_MEASUREMENTS else "predicted"
        is_slower = f"; {how} to be slower than dense" if chosen.costs["time"] > dense.costs["time"] else ""
        reason = f"{aim}; {order.menu.basis}{left_out}{is_slower}"
    return LayerChoice(chosen, dense, reason)


def _aim(limits: Mapping[str, float], totals: Mapping[str, float], budget: Limits) -> str:
    kept = [
        f"{name} <= {limit:,.6g}{' s' * (name == 'time')} (dense {totals[name]:,.6g})" for name, limit in limits.items()
    ]
    if budget.loss is not None:
        kept.append(f"a predicted loss <= {budget.loss:.6g}")
    return f"least predicted {'loss' if budget.loss is None else 'time'} within {', '.join(kept)}"


def _listed(orders: Sequence[LayerOrder]) -> str:
    names = [order.name or "(no name)" for order in orders]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

"""From menus to choices: one solver over all sites of a graph, and a reason in words for each choice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy

from structfly.records import Candidate, CostValues, DeviceProfile, Menu
from structfly.records.report import format_bytes
from structfly.rewriter.roofline import evaluate
from structfly.rewriter.solver import Option, solve


@dataclass(frozen=True)
class Order:
    """A menu with what it is chosen from under.

    Attributes:
        sizes: example values of the symbols in its costs.
        menu: what there is.
        profile: the device it runs on.
        always: choose among the rewrites only (``rewrite="always"``).
    """

    sizes: Mapping[sympy.Symbol, int]
    menu: Menu
    profile: DeviceProfile
    always: bool


@dataclass(frozen=True)
class Choice:
    """The solver's choice at one site.

    Attributes:
        candidate: the chosen one.
        values: its cost at the example sizes.
        kept: the cost of leaving the site alone.
        reason: why this one.
    """

    candidate: Candidate
    values: CostValues
    kept: CostValues
    reason: str


def choose(orders: Sequence[Order]) -> list[Choice]:
    """Minimise the predicted time of all sites together, under each site's peak and the graph's saved memory.

    Saved bytes beyond what the sites need in any case may reach the largest peak limit, and no more.
    """
    costs = [[evaluate(c.cost, order.sizes, order.profile) for c in order.menu.candidates] for order in orders]
    eligible = [
        [
            number
            for number, candidate in enumerate(order.menu.candidates)
            if candidate.rewrites or not (order.always or order.menu.settled) or len(order.menu.candidates) == 1
        ]
        for order in orders
    ]
    options = [
        [
            Option(
                values[n].seconds,
                {"saved bytes": float(values[n].saved_bytes)},
                float(values[n].transient_bytes),
            )
            for n in numbers
        ]
        for values, numbers in zip(costs, eligible, strict=True)
    ]
    shared: dict[str, int] = {}
    for order in orders:
        shared.update(order.menu.shared_bytes)
    limits = [order.menu.peak_limit for order in orders]
    allowance = float(sum(order.menu.own_bytes for order in orders) + sum(shared.values()))
    allowance += max((limit for limit in limits if limit < math.inf), default=0)
    solution = solve(options, peaks=limits, limits={"saved bytes": allowance})
    return [
        _explained(order, values, numbers[picked], index in solution.relaxed)
        for index, (order, values, numbers, picked) in enumerate(
            zip(orders, costs, eligible, solution.chosen, strict=True)
        )
    ]


def _explained(order: Order, costs: Sequence[CostValues], number: int, relaxed: bool) -> Choice:
    candidates = order.menu.candidates
    limit = "" if order.menu.peak_limit == math.inf else f" within the limit of {format_bytes(order.menu.peak_limit)}"
    kept = next(values for candidate, values in zip(candidates, costs, strict=True) if not candidate.rewrites)
    chosen, values = candidates[number], costs[number]
    fast = [v.seconds for c, v in zip(candidates, costs, strict=True) if c.rewrites]
    if order.menu.settled:
        reason = order.menu.settled
    elif relaxed:
        least = format_bytes(values.transient_bytes)
        reason = f"nothing fits the limit of {format_bytes(order.menu.peak_limit)}; this takes the least, {least}"
    elif not chosen.rewrites:
        best = min(fast, default=float("inf"))
        reason = (
            f"predicted to be fastest as it is: {values.seconds * 1e6:.3g} us, best rewrite {best * 1e6:.3g} us; "
            "rewrite='always' overrides this"
        )
    elif kept.transient_bytes > order.menu.peak_limit:
        reason = f"fastest{limit}; left alone it would take {format_bytes(kept.transient_bytes)}"
    else:
        reason = f"predicted to be fastest{limit}"
    return Choice(chosen, values, kept, reason)

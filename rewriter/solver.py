"""The budget solver: one option per site, least total value, every limit kept.

This is the multiple-choice knapsack.  Where each site's cheapest option already fits together, that is the optimum and
no search is needed; otherwise HiGHS solves the integer program (:func:`scipy.optimize.milp`) and reports its bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Option:
    """One way of running a site.

    Attributes:
        value: what is minimised, summed over sites.
        uses: amounts of each limited resource, summed over sites.
        peak: a transient amount, limited per site.
    """

    value: float
    uses: Mapping[str, float] = field(default_factory=dict)
    peak: float = 0.0


class Solution(NamedTuple):
    """The chosen options.

    Attributes:
        chosen: index of the option of each site.
        value: total value.
        bound: no choice within the limits has a smaller total than this.
        gap: ``(value - bound) / |value|``, 0 where the choice is proven best.
        relaxed: sites whose peak limit no option keeps; they took their option of smallest peak.
    """

    chosen: tuple[int, ...]
    value: float
    bound: float
    gap: float
    relaxed: frozenset[int]


def solve(
    sites: Sequence[Sequence[Option]], *, peaks: Sequence[float], limits: Mapping[str, float] | None = None
) -> Solution:
    """Choose one option per site.

    Args:
        sites: the options of each site, at least one each.
        peaks: the largest peak allowed at each site.
        limits: the largest sum allowed of each resource.

    Raises:
        ValueError: no choice keeps the limits; the message gives the smallest sum possible.
    """
    limits = dict(limits or {})
    allowed: list[list[int]] = []
    relaxed: set[int] = set()
    for index, (options, peak) in enumerate(zip(sites, peaks, strict=True)):
        fitting = [number for number, option in enumerate(options) if option.peak <= peak]
        if not fitting:
            relaxed.add(index)
            smallest = min(option.peak for option in options)
            fitting = [number for number, option in enumerate(options) if option.peak == smallest]
        allowed.append(fitting)
    cheapest = [
        min(fitting, key=lambda number: (options[number].value, options[number].peak))
        for options, fitting in zip(sites, allowed, strict=True)
    ]
    total = sum(options[number].value for options, number in zip(sites, cheapest, strict=True))
    if all(_used(sites, cheapest, resource) <= limit for resource, limit in limits.items()):
        return Solution(tuple(cheapest), total, total, 0.0, frozenset(relaxed))
    chosen, bound = _integer_program(sites, allowed, limits)
    value = sum(options[number].value for options, number in zip(sites, chosen, strict=True))
    gap = max(0.0, value - bound) / abs(value) if value else 0.0
    return Solution(tuple(chosen), value, bound, gap, frozenset(relaxed))


def _used(sites: Sequence[Sequence[Option]], chosen: Sequence[int], resource: str) -> float:
    return sum(options[number].uses.get(resource, 0.0) for options, number in zip(sites, chosen, strict=True))


def _integer_program(
    sites: Sequence[Sequence[Option]], allowed: Sequence[Sequence[int]], limits: Mapping[str, float]
) -> tuple[list[int], float]:
    from scipy.optimize import Bounds, LinearConstraint, milp

    variables = [(site, number) for site, fitting in enumerate(allowed) for number in fitting]
    options = [sites[site][number] for site, number in variables]
    one_each = np.zeros((len(sites), len(variables)))
    for column, (site, _) in enumerate(variables):
        one_each[site, column] = 1.0
    constraints = [LinearConstraint(one_each, 1.0, 1.0)]
    for resource, limit in limits.items():
        row = np.array([option.uses.get(resource, 0.0) for option in options])
        # Bytes span many orders of magnitude; HiGHS' tolerances are absolute.
        scale = max(float(np.abs(row).max()), 1.0)
        constraints.append(LinearConstraint(row[None, :] / scale, -np.inf, limit / scale))
    values = np.array([option.value for option in options])
    scale = max(float(np.abs(values).max()), 1e-300)
    result = milp(
        values / scale,
        constraints=constraints,
        integrality=np.ones(len(variables), dtype=np.int64),
        bounds=Bounds(0, 1),
    )
    if result.x is None:
        least = {
            resource: sum(
                min(sites[site][number].uses.get(resource, 0.0) for number in fitting)
                for site, fitting in enumerate(allowed)
            )
            for resource in limits
        }
        wanted = ", ".join(f"{resource} <= {limit:.6g}" for resource, limit in limits.items())
        smallest = ", ".join(f"{resource} {amount:.6g}" for resource, amount in least.items())
        raise ValueError(f"no choice keeps {wanted}; the smallest possible of each alone: {smallest}")
    chosen = [-1] * len(sites)
    for (site, number), taken in zip(variables, result.x, strict=True):
        if taken > 0.5:
            chosen[site] = number
    return chosen, float(result.mip_dual_bound) * scale

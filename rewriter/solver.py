"""The budget solver: one option per site, least total value, every limit kept.

This is the multiple-choice knapsack.  Where each site's cheapest option already fits together, that is the optimum and
no search is needed.  Otherwise the linear relaxation (:mod:`~structfly.rewriter.lagrangian`) gives a bound, a choice
that fits, and leaves few options of each site; of those HiGHS (:func:`scipy.optimize.milp`) proves the best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from structfly.rewriter.lagrangian import Numbers, relax

_ROUNDING = 1e-12
_SEARCH_ROUNDING = 1e-9  # of a value, in HiGHS' bound
_UNIT = 1e-3  # of a known choice's value: HiGHS stops at an absolute gap of 1e-6 in units of what it is given


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


class ImpossibleError(ValueError):
    """No choice keeps the limits.

    Attributes:
        alone: the smallest sum possible of each resource, if the others had no limit.
        factor: multiplied by this, and by nothing less, the limits can be kept together; infinite where a limit of 0
            cannot.
    """

    def __init__(self, limits: Mapping[str, float], alone: Mapping[str, float], factor: float) -> None:
        self.alone, self.factor = dict(alone), factor
        wanted = ", ".join(f"{name} <= {limit:.6g}" for name, limit in limits.items())
        smallest = ", ".join(f"{name} {amount:.6g}" for name, amount in alone.items())
        super().__init__(f"no choice keeps {wanted}; the smallest possible of each alone: {smallest}")


def solve(
    sites: Sequence[Sequence[Option]],
    *,
    peaks: Sequence[float] | None = None,
    limits: Mapping[str, float] | None = None,
    peak_counts_as: str = "",
) -> Solution:
    """Choose one option per site.

    Args:
        sites: the options of each site, at least one each.
        peaks: the largest peak allowed at each site, None for any.
        limits: the largest sum allowed of each resource.
        peak_counts_as: the resource to whose sum the largest peak of all sites is added, "" for none.

    Raises:
        ImpossibleError: no choice keeps the limits.
    """
    limits = dict(limits or {})
    allowed, relaxed = _within(sites, peaks or [float("inf")] * len(sites))
    problem = _Problem(sites, allowed, limits, peak_counts_as)
    cheapest = [
        min(fitting, key=lambda number: (options[number].value, options[number].peak))
        for options, fitting in zip(sites, allowed, strict=True)
    ]
    if problem.keeps(cheapest):
        total = problem.value(cheapest)
        return Solution(tuple(cheapest), total, total, 0.0, frozenset(relaxed))
    chosen, bound = problem.solve()
    value = problem.value(chosen)
    gap = (value - bound) / abs(value) if value else 0.0
    gap = gap if gap > _SEARCH_ROUNDING else 0.0
    return Solution(tuple(chosen), value, min(bound, value), gap, frozenset(relaxed))


def _within(sites: Sequence[Sequence[Option]], peaks: Sequence[float]) -> tuple[list[list[int]], set[int]]:
    """The options of each site that keep its peak, or those of smallest peak where none does, and where that is."""
    allowed: list[list[int]] = []
    relaxed: set[int] = set()
    for index, (options, peak) in enumerate(zip(sites, peaks, strict=True)):
        fitting = [number for number, option in enumerate(options) if option.peak <= peak]
        if not fitting:
            relaxed.add(index)
            smallest = min(option.peak for option in options)
            fitting = [number for number, option in enumerate(options) if option.peak == smallest]
        allowed.append(fitting)
    return allowed, relaxed


class _Problem:
    """One integer program, in units in which limits and values are about 1."""

    def __init__(
        self,
        sites: Sequence[Sequence[Option]],
        allowed: Sequence[Sequence[int]],
        limits: Mapping[str, float],
        peak_counts_as: str,
    ) -> None:
        self.sites, self.allowed, self.limits, self.peak_counts_as = sites, allowed, limits, peak_counts_as
        self.scales = {name: limit if limit > 0 else 1.0 for name, limit in limits.items()}
        options = [
            option for site, fitting in zip(sites, allowed, strict=True) for option in (site[n] for n in fitting)
        ]
        self.value_scale = max((abs(option.value) for option in options), default=0.0) or 1.0

    def value(self, chosen: Sequence[int]) -> float:
        return sum(options[number].value for options, number in zip(self.sites, chosen, strict=True))

    def keeps(self, chosen: Sequence[int]) -> bool:
        """Whether all limits are kept, up to what adding up rounds."""
        return all(self.used(name, chosen) <= limit + _ROUNDING * abs(limit) for name, limit in self.limits.items())

    def used(self, name: str, chosen: Sequence[int]) -> float:
        options = [options[number] for options, number in zip(self.sites, chosen, strict=True)]
        peak = max((option.peak for option in options), default=0.0) if name == self.peak_counts_as else 0.0
        return sum(option.uses.get(name, 0.0) for option in options) + peak

    def solve(self) -> tuple[list[int], float]:
        """The best choice and a bound on all."""
        open_options, bound, known = self.allowed, float("-inf"), None
        if self.peak_counts_as in self.limits:  # the relaxation has no peaks; a first search finds a choice
            first = self._integer_program(open_options)
            if first is not None and self.keeps(first[0]):
                known = first[0]
        else:
            relaxed = relax(*self._numbers(self.allowed), np.array([self._limit(name) for name in self.limits]))
            if relaxed is None:
                raise self._impossible()
            open_options = [[f[j] for j in still] for f, still in zip(self.allowed, relaxed.open, strict=True)]
            bound = relaxed.bound * self.value_scale
            if relaxed.chosen is not None:
                known = [fitting[j] for fitting, j in zip(self.allowed, relaxed.chosen, strict=True)]
        if known is not None:
            self.value_scale = abs(self.value(known)) * _UNIT or self.value_scale
        result = self._integer_program(open_options)
        if result is None and known is None:
            raise self._impossible()
        if result is None or not self.keeps(result[0]):  # the limits are kept exactly, not to the search's tolerance
            result = self._integer_program(open_options, tighter=1e-7) or result
        choices = [each for each in (known, result[0] if result else None) if each is not None and self.keeps(each)]
        if not choices:
            raise self._impossible()
        best = min(choices, key=self.value)
        found = result[1] * self.value_scale if result else self.value(best)
        return list(best), max(bound, min(found, self.value(best)))

    def _limit(self, name: str) -> float:
        return self.limits[name] / self.scales[name]

    def _numbers(self, options: Sequence[Sequence[int]]) -> tuple[list[Numbers], list[Numbers]]:
        """Values and uses of each site's options."""
        values, uses = [], []
        for site, fitting in zip(self.sites, options, strict=True):
            values.append(np.array([site[n].value for n in fitting]) / self.value_scale)
            rows = [[site[n].uses.get(name, 0.0) / self.scales[name] for name in self.limits] for n in fitting]
            uses.append(np.array(rows).reshape(len(fitting), len(self.limits)))
        return values, uses

    def _integer_program(
        self, options: Sequence[Sequence[int]], *, tighter: float = 0.0, least_factor: bool = False
    ) -> tuple[list[int], float] | None:
        """HiGHS on these options: the choice and a bound in scaled units, or None if there is no choice.

        With ``least_factor`` it is the factor of all limits that is minimised.
        """
        from scipy.optimize import Bounds, LinearConstraint, milp

        values, uses = self._numbers(options)
        where = np.repeat(np.arange(len(options)), [len(each) for each in options])
        count, names = len(where), list(self.limits)
        extra = 2  # the largest peak, and the factor of the limits
        peaks = np.array([site[n].peak for site, fitting in zip(self.sites, options, strict=True) for n in fitting])
        peak_scale = self.scales.get(self.peak_counts_as, 1.0)
        one_each = np.zeros((len(options), count + extra))
        one_each[where, np.arange(count)] = 1.0
        constraints = [LinearConstraint(one_each, 1.0, 1.0)]
        used = np.zeros((len(names), count + extra))
        used[:, :count] = np.concatenate(uses).T
        limits = np.array([self._limit(name) for name in names])
        if self.peak_counts_as in self.limits:
            used[names.index(self.peak_counts_as), count] = 1.0
            above = one_each.copy()
            above[where, np.arange(count)] = peaks / peak_scale
            above[:, count] = -1.0
            constraints.append(LinearConstraint(above, -np.inf, 0.0))
        if least_factor:
            used[:, count + 1] = -limits
        constraints.append(LinearConstraint(used, -np.inf, 0.0 if least_factor else limits * (1 - tighter)))
        objective = np.zeros(count + extra)
        objective[:count] = 0.0 if least_factor else np.concatenate(values)
        objective[count + 1] = float(least_factor)
        result: Any = milp(
            objective,
            constraints=constraints,
            integrality=np.array([1] * count + [0] * extra),
            bounds=Bounds(0, np.array([1.0] * count + [np.inf] * extra)),
            options={"mip_rel_gap": 0.0},
        )
        if result.x is None:
            return None
        chosen = [-1] * len(options)
        flat = [number for fitting in options for number in fitting]
        for site, number, taken in zip(where, flat, result.x, strict=False):
            if taken > 0.5:
                chosen[site] = number
        return chosen, float(result.mip_dual_bound)

    def _impossible(self) -> ImpossibleError:
        alone = {
            name: sum(
                min(site[n].uses.get(name, 0.0) for n in fitting)
                for site, fitting in zip(self.sites, self.allowed, strict=True)
            )
            for name in self.limits
        }
        least = self._integer_program(self.allowed, least_factor=True) if self.limits else None
        return ImpossibleError(self.limits, alone, float("inf") if least is None else least[1])

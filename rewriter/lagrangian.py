"""The multiple-choice knapsack's linear relaxation: its bound, a choice near it, and which options cannot be best.

With multipliers m >= 0 of the limits b, every choice within them has at least the value

    L(m) = sum_i min_j (v_ij + m u_ij) - m b,

whose largest value over m is that of the linear relaxation, and its dual variables are that m (Geoffrion 1974).  An
option ij with L(m) + (v_ij + m u_ij) - min_k (v_ik + m u_ik) above the value of a known choice is in no better one, so
the integer program need not look at it.  A choice is found by rounding the relaxation down to what fits and then taking
single changes that lower the value as long as there are any.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
_SLACK = 1e-9  # of the value: what rounding may hide


class Relaxed(NamedTuple):
    """What the relaxation says.

    Attributes:
        bound: no choice within the limits has a smaller value.
        chosen: a choice within the limits, an option of each site, or None if rounding found none.
        value: its value, infinite without one.
        open: for each site the options that may still be in a better choice.
    """

    bound: float
    chosen: list[int] | None
    value: float
    open: list[list[int]]


def relax(values: Sequence[Numbers], uses: Sequence[Numbers], limits: Numbers) -> Relaxed | None:
    """Solve the relaxation, or None where even that is impossible.

    Args:
        values: of each site's options (J_i,).
        uses: of each site's options (J_i, R), in units in which the limits are about 1.
        limits: (R,).
    """
    from scipy.optimize import linprog

    sites = len(values)
    where = np.repeat(np.arange(sites), [len(each) for each in values])
    flat, used = np.concatenate(values), np.concatenate(uses)
    one_each = np.zeros((sites, len(flat)))
    one_each[where, np.arange(len(flat))] = 1.0
    found = linprog(flat, A_ub=used.T, b_ub=limits, A_eq=one_each, b_eq=np.ones(sites), bounds=(0, 1), method="highs")
    if found.x is None:
        return None
    multipliers = np.maximum(-found.ineqlin.marginals, 0.0)
    priced = [v + u @ multipliers for v, u in zip(values, uses, strict=True)]
    bound = float(sum(each.min() for each in priced) - multipliers @ limits)
    shares = np.split(found.x, np.cumsum([len(each) for each in values])[:-1])
    chosen = _rounded([int(share.argmax()) for share in shares], values, uses, limits)
    value = float("inf") if chosen is None else float(sum(v[j] for v, j in zip(values, chosen, strict=True)))
    allowance = value - bound + _SLACK * max(abs(value), abs(bound), 1e-30)
    still = [np.flatnonzero(each - each.min() <= allowance).tolist() for each in priced]
    return Relaxed(bound, chosen, value, still)


def _rounded(
    chosen: list[int], values: Sequence[Numbers], uses: Sequence[Numbers], limits: Numbers
) -> list[int] | None:
    """The choice, changed until it fits and then until no single change betters it; None if it never fits."""
    used = np.sum([u[j] for u, j in zip(uses, chosen, strict=True)], axis=0)
    while (over := np.maximum(used - limits, 0.0)).any():
        best: tuple[float, int, int] | None = None
        for site, (value, use) in enumerate(zip(values, uses, strict=True)):
            relief = over.sum() - np.maximum(used - use[chosen[site]] + use - limits, 0.0).sum(axis=1)
            price = np.where(relief > 0, (value - value[chosen[site]]) / np.where(relief > 0, relief, 1.0), np.inf)
            option = int(price.argmin())
            if np.isfinite(price[option]) and (best is None or price[option] < best[0]):
                best = float(price[option]), site, option
        if best is None:
            return None
        _, site, option = best
        used = used - uses[site][chosen[site]] + uses[site][option]
        chosen[site] = option
    while True:
        gains = []
        for site, (value, use) in enumerate(zip(values, uses, strict=True)):
            fits = (used - use[chosen[site]] + use <= limits).all(axis=1)
            candidates = np.where(fits, value, np.inf)
            option = int(candidates.argmin())
            gains.append((float(value[chosen[site]] - candidates[option]), site, option))
        gain, site, option = max(gains)
        if gain <= 0.0:
            return chosen
        used = used - uses[site][chosen[site]] + uses[site][option]
        chosen[site] = option

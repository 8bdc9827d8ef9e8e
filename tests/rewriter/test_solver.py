"""The solver against brute force."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from structfly.rewriter.solver import Option, solve

options = st.builds(
    Option,
    value=st.integers(0, 50).map(float),
    uses=st.fixed_dictionaries({"bytes": st.integers(0, 20).map(float), "flops": st.integers(0, 20).map(float)}),
    peak=st.integers(0, 10).map(float),
)
problems = st.lists(st.lists(options, min_size=1, max_size=4), min_size=1, max_size=5)


def best_by_hand(sites: list[list[Option]], peaks: list[float], limits: dict[str, float]) -> float | None:
    allowed = []
    for site, peak in zip(sites, peaks, strict=True):
        fitting = [option for option in site if option.peak <= peak]
        smallest = min(option.peak for option in site)
        allowed.append(fitting or [option for option in site if option.peak == smallest])
    totals = [
        sum(option.value for option in choice)
        for choice in itertools.product(*allowed)
        if all(sum(option.uses[name] for option in choice) <= limit for name, limit in limits.items())
    ]
    return min(totals, default=None)


@settings(max_examples=200)
@given(sites=problems, peak=st.integers(0, 10), bytes_limit=st.integers(0, 60), flops_limit=st.integers(0, 60))
def test_equals_brute_force(sites: list[list[Option]], peak: int, bytes_limit: int, flops_limit: int) -> None:
    peaks = [float(peak)] * len(sites)
    limits = {"bytes": float(bytes_limit), "flops": float(flops_limit)}
    expected = best_by_hand(sites, peaks, limits)
    if expected is None:
        with pytest.raises(ValueError, match="smallest possible"):
            solve(sites, peaks=peaks, limits=limits)
        return
    solution = solve(sites, peaks=peaks, limits=limits)
    assert solution.value == pytest.approx(expected)
    assert solution.bound <= solution.value + 1e-6
    assert solution.gap <= 1e-6
    for name, limit in limits.items():
        used = sum(site[number].uses[name] for site, number in zip(sites, solution.chosen, strict=True))
        assert used <= limit


def test_a_limit_that_binds_moves_the_cheaper_site() -> None:
    early, late = Option(1.0, {"saved": 8.0}), Option(2.0, {"saved": 0.0})
    cheap_to_move = [Option(1.0, {"saved": 8.0}), Option(1.5, {"saved": 0.0})]
    solution = solve([[early, late], cheap_to_move], peaks=[0.0, 0.0], limits={"saved": 8.0})
    assert solution.chosen == (0, 1)
    assert solution.value == 2.5


def test_where_nothing_fits_the_smallest_peak_is_taken_and_said() -> None:
    solution = solve([[Option(1.0, peak=9.0), Option(5.0, peak=7.0), Option(4.0, peak=7.0)]], peaks=[3.0])
    assert solution.chosen == (2,)
    assert solution.relaxed == {0}


def test_ties_go_to_the_smaller_peak() -> None:
    assert solve([[Option(1.0, peak=5.0), Option(1.0, peak=2.0)]], peaks=[9.0]).chosen == (1,)

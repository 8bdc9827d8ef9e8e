"""The solver against brute force."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.solver_time import problem
from structfly.rewriter.solver import ImpossibleError, Option, solve

options = st.builds(
    Option,
    value=st.integers(0, 50).map(float),
    uses=st.fixed_dictionaries({"bytes": st.integers(0, 20).map(float), "flops": st.integers(0, 20).map(float)}),
    peak=st.integers(0, 10).map(float),
)
problems = st.lists(st.lists(options, min_size=1, max_size=4), min_size=1, max_size=5)


def best_by_hand(
    sites: list[list[Option]], peaks: list[float], limits: dict[str, float], peak_counts_as: str = ""
) -> float | None:
    allowed = []
    for site, peak in zip(sites, peaks, strict=True):
        fitting = [option for option in site if option.peak <= peak]
        smallest = min(option.peak for option in site)
        allowed.append(fitting or [option for option in site if option.peak == smallest])
    totals = [
        sum(option.value for option in choice)
        for choice in itertools.product(*allowed)
        if all(used(choice, name, peak_counts_as) <= limit for name, limit in limits.items())
    ]
    return min(totals, default=None)


def used(choice: Sequence[Option], name: str, peak_counts_as: str = "") -> float:
    peak = max(option.peak for option in choice) if name == peak_counts_as else 0.0
    return sum(option.uses[name] for option in choice) + peak


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
    choice = [site[number] for site, number in zip(sites, solution.chosen, strict=True)]
    assert all(used(choice, name) <= limit for name, limit in limits.items())


@settings(max_examples=100)
@given(sites=problems, limit=st.integers(0, 60), flops_limit=st.integers(0, 60))
def test_the_largest_peak_may_count_as_a_resource(sites: list[list[Option]], limit: int, flops_limit: int) -> None:
    limits = {"bytes": float(limit), "flops": float(flops_limit)}
    expected = best_by_hand(sites, [float("inf")] * len(sites), limits, "bytes")
    if expected is None:
        with pytest.raises(ImpossibleError):
            solve(sites, limits=limits, peak_counts_as="bytes")
        return
    solution = solve(sites, limits=limits, peak_counts_as="bytes")
    assert solution.value == pytest.approx(expected)
    choice = [site[number] for site, number in zip(sites, solution.chosen, strict=True)]
    assert all(used(choice, name, "bytes") <= limit for name, limit in limits.items())


@settings(max_examples=100)
@given(sites=problems, limit=st.integers(1, 30), flops_limit=st.integers(1, 30))
def test_an_impossible_budget_says_what_is_possible(sites: list[list[Option]], limit: int, flops_limit: int) -> None:
    limits = {"bytes": float(limit), "flops": float(flops_limit)}
    if best_by_hand(sites, [float("inf")] * len(sites), limits) is not None:
        return
    with pytest.raises(ImpossibleError) as caught:
        solve(sites, limits=limits)
    assert caught.value.alone == {name: sum(min(o.uses[name] for o in site) for site in sites) for name in limits}
    factor = caught.value.factor
    solve(sites, limits={name: each * factor * (1 + 1e-6) for name, each in limits.items()})
    with pytest.raises(ImpossibleError):
        solve(sites, limits={name: each * factor * (1 - 1e-3) for name, each in limits.items()})


@pytest.mark.parametrize("peak_counts_as", ["", "bytes"])
@settings(max_examples=60)
@given(data=st.data())
def test_what_is_best_is_proven_beside_options_that_cost_a_million_times_as_much(
    data: st.DataObject, peak_counts_as: str
) -> None:
    """Values of about 1, which the search must tell apart although they differ by as little as 1e-7."""
    near = st.builds(
        lambda value, amount: Option(1 + 1e-7 * value, {"bytes": float(amount)}),
        st.integers(0, 1000),
        st.integers(1, 20),
    )
    sites = data.draw(st.lists(st.lists(near, min_size=2, max_size=4), min_size=3, max_size=6))
    sites = [[*site, Option(1e6, {"bytes": 0.0})] for site in sites]
    limits = {"bytes": float(sum(min(option.uses["bytes"] for option in site[:-1]) for site in sites) + 5)}
    solution = solve(sites, limits=limits, peak_counts_as=peak_counts_as)
    expected = best_by_hand(sites, [float("inf")] * len(sites), limits, peak_counts_as)
    assert solution.value == pytest.approx(expected, rel=1e-12)
    assert solution.gap == 0.0


def test_hundreds_of_layers_under_three_budgets_are_proven_best_in_seconds() -> None:
    sites, limits = problem(layers=224, candidates=50, seed=0)
    start = time.perf_counter()
    solution = solve(sites, limits=limits)
    assert time.perf_counter() - start < 60  # a busy machine; benchmarks/results has the time alone
    assert solution.gap == 0.0


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

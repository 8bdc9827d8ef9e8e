"""Rules of allocation: each keeps the budget, and the solver is the best of them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from structfly import Budget
from structfly.errors import PlanError
from structfly.patterns.gblr import GBLR
from structfly.patterns.linear.candidates import Candidate
from structfly.patterns.low_rank import LowRank
from structfly.patterns.pixelfly import Pixelfly
from structfly.patterns.structure import Structure
from structfly.records.layer import LayerSizes
from structfly.restructure.allocation import STRATEGIES, by_pixelfly, by_solver, by_threshold
from structfly.rewriter.layer_budget import dense_totals
from structfly.rewriter.layer_costs import keeps

SIZES = LayerSizes(256, 256)
MENUS: list[list[Structure]] = [list(kind.menu(SIZES)[:3]) for kind in (Pixelfly, GBLR, LowRank)]


def candidate(structure: Structure | None, loss: float, params: float, transient: float = 0.0) -> Candidate:
    names = ("params", "flops", "weight_bytes", "saved_bytes", "time")
    return Candidate(structure, loss, {**dict.fromkeys(names, params), "transient_bytes": transient})


@st.composite
def problems(draw: st.DrawFn) -> dict[str, list[Candidate]]:
    found = {}
    for number in range(draw(st.integers(1, 3))):
        size = draw(st.sampled_from((10.0, 30.0)))
        menu = [candidate(None, 0.0, size)]
        for structure in itertools.chain(*MENUS):
            share = draw(st.floats(0.05, 0.95))
            menu.append(candidate(structure, draw(st.floats(0.01, 5.0)), size * share, draw(st.floats(0, 5))))
        found[f"layer{number}"] = menu
    return found


@settings(max_examples=60, deadline=None)
@given(candidates=problems(), share=st.floats(0.1, 1.0))
def test_every_rule_keeps_the_budget_and_none_beats_the_solver(
    candidates: dict[str, list[Candidate]], share: float
) -> None:
    budget = Budget(params=share)
    limits = {"params": share * dense_totals(list(candidates.values()), ["params"])["params"]}
    losses = {}
    for name, rule in STRATEGIES.items():
        try:
            chosen = rule(candidates, budget, limits).chosen
        except PlanError:
            continue
        assert keeps([each.costs for each in chosen.values()], limits), name
        losses[name] = sum(each.loss for each in chosen.values())
    if losses:
        assert losses["solver"] <= min(losses.values()) * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(candidates=problems(), share=st.floats(0.2, 1.0), activations=st.floats(5.0, 60.0))
def test_activations_count_the_largest_transient(
    candidates: dict[str, list[Candidate]], share: float, activations: float
) -> None:
    limits = {
        "params": share * dense_totals(list(candidates.values()), ["params"])["params"],
        "activation_bytes": activations,
    }
    everything = itertools.product(*candidates.values())
    best = min(
        (
            sum(each.loss for each in choice)
            for choice in itertools.islice(everything, 2000)
            if keeps([each.costs for each in choice], limits)
        ),
        default=None,
    )
    try:
        found = by_solver(candidates, Budget(params=share), limits)
    except PlanError:
        assert best is None
        return
    assert keeps([each.costs for each in found.chosen.values()], limits)
    assert best is not None
    assert sum(each.loss for each in found.chosen.values()) == pytest.approx(best)


def test_pixelfly_shares_by_compute() -> None:
    one, two = MENUS[0][:2]
    small = [candidate(None, 0, 10), candidate(one, 1, 4), candidate(two, 2, 2)]
    large = [candidate(None, 0, 30), candidate(one, 1, 16), candidate(two, 2, 14)]
    chosen = by_pixelfly({"small": small, "large": large}, Budget(params=0.5), {"params": 20.0}).chosen
    assert [each.costs["params"] for each in chosen.values()] == [4, 14]
    with pytest.raises(PlanError, match="no Pixelfly of 'large' fits its share"):
        by_pixelfly({"small": small, "large": large}, Budget(params=0.4), {"params": 16.0})
    with pytest.raises(PlanError, match="the strategy needs 'pixelfly', which 'bare' is not offered"):
        by_pixelfly({"bare": small[:1]}, Budget(params=0.4), {"params": 16.0})


def test_one_threshold_for_all_layers() -> None:
    one, two = MENUS[1][:2]
    steep = [candidate(None, 0, 10), candidate(one, 1, 8), candidate(two, 9, 4)]
    flat = [candidate(None, 0, 10), candidate(one, 1, 8), candidate(two, 1.5, 4)]
    chosen = by_threshold({"steep": steep, "flat": flat}, Budget(params=0.6), {"params": 12.0}).chosen
    assert [each.costs["params"] for each in chosen.values()] == [8, 4]

"""One survey serves all budgets."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from structfly import Budget, Survey, apply_, restructure_, survey
from structfly.errors import ArgumentError, PlanError
from tests.restructure.models import DISTILLATION, batches, make


@cache
def surveyed() -> Survey:
    return survey(make(), calibration=batches(), loss_fn=DISTILLATION, progress=False)


@settings(max_examples=8, deadline=None)
@given(
    params=st.floats(0.3, 1.0),
    weight_bytes=st.one_of(st.none(), st.floats(0.3, 1.0)),
    strategy=st.sampled_from(["solver", "uniform"]),
)
def test_a_plan_is_that_of_a_run_of_its_own(params: float, weight_bytes: float | None, strategy: str) -> None:
    """Applied to a copy, it makes the same model."""
    budget, known = Budget(params=params, weight_bytes=weight_bytes), surveyed()
    model, mine = make(), make()
    expected = restructure_(
        model, budget, strategy=strategy, calibration=batches(), loss_fn=DISTILLATION, progress=False
    )
    plan = known.plan(budget, strategy)
    apply_(mine, plan, statistics=known.statistics)
    measured = known.measured(plan, mine)
    assert measured == expected
    assert measured.strategy == strategy
    assert measured.measured is not None
    assert measured.measured.structured == pytest.approx(distance(mine), abs=1e-6)
    ids = batches()[0]
    assert torch.equal(mine(ids), model(ids))


def distance(model: nn.Module) -> float:
    """From the dense model, over all calibration data."""
    dense = make()
    each = [DISTILLATION.distance(model, batch, DISTILLATION.reference(dense, batch)) for batch in batches()]
    return float(torch.cat(each).mean())


def test_neither_a_survey_nor_a_plan_changes_the_model_and_a_plan_does_not_need_it() -> None:
    model = make()
    before, modules = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    known = survey(model, calibration=batches(), loss_fn=DISTILLATION, refine=2, progress=False)
    plan = known.plan(Budget(params=0.5))
    assert [type(module) for module in model.modules()] == modules
    assert {name: torch.equal(value, before[name]) for name, value in model.state_dict().items()} == dict.fromkeys(
        before, True
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert known.plan(Budget(params=0.5)) == plan


def test_a_larger_budget_is_not_predicted_to_lose_more() -> None:
    losses = [surveyed().plan(Budget(params=share)).predicted_loss for share in (1.0, 0.8, 0.6, 0.4, 0.3)]
    assert losses == sorted(losses)
    assert losses[0] == 0.0
    uniform = [surveyed().plan(Budget(params=share), "uniform").predicted_loss for share in (0.8, 0.6, 0.4, 0.3)]
    assert all(mine < other for mine, other in zip(losses[1:], uniform, strict=True))


def test_what_cannot_be_planned_or_measured_is_named() -> None:
    known = survey(make(), progress=False)
    with pytest.raises(ArgumentError, match="strategy is 'best'; allowed: solver"):
        known.plan(Budget(params=0.5), "best")
    with pytest.raises(ArgumentError, match="the strategy 'uniform' cannot seek the least time"):
        known.plan(Budget(loss=1.0), "uniform")
    with pytest.raises(PlanError, match="least possible alone"):
        known.plan(Budget(params=0.001))
    with pytest.raises(ArgumentError, match="no data to measure a loss on; give it calibration and loss_fn"):
        known.measured(known.plan(Budget(params=0.5)), make())

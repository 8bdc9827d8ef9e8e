"""From a budget to a restructured model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from structfly import Budget, Distillation, StructuredLinear, apply_, restructure_
from structfly.errors import ArgumentError, PlanError
from structfly.restructure import Plan
from structfly.restructure.measuring import Loss
from tests.compiling import Rewritten
from tests.restructure.models import DISTILLATION, batches, logits, make


def plan_for(budget: Budget, model: nn.Module | None = None, **options: object) -> Plan:
    given: dict[str, object] = {"calibration": batches(), "loss_fn": DISTILLATION, "progress": False, **options}
    return restructure_(make() if model is None else model, budget, **given)  # type: ignore[arg-type]


@settings(max_examples=15, deadline=None)
@given(
    params=st.one_of(st.none(), st.floats(0.2, 1.0)),
    flops=st.one_of(st.none(), st.floats(0.2, 1.0)),
    weight_bytes=st.one_of(st.none(), st.integers(3000, 30000)),
    activation_bytes=st.one_of(st.none(), st.integers(5000, 60000)),
)
def test_no_limit_is_exceeded(
    params: float | None, flops: float | None, weight_bytes: int | None, activation_bytes: int | None
) -> None:
    limits = {"params": params, "flops": flops, "weight_bytes": weight_bytes, "activation_bytes": activation_bytes}
    given = {name: value for name, value in limits.items() if value is not None}
    if not given:
        return
    model = make()
    dense = sum(p.numel() for name, p in model.named_parameters() if name.split(".")[0] in ("up", "down", "conv"))
    try:
        plan = plan_for(Budget(**given), model, calibration=None, loss_fn=None, structures=["low_rank"], tokens=10)
    except PlanError:
        return
    assert plan.met == dict.fromkeys(given, True)
    assert plan.gap == 0.0
    if params is not None:
        left = sum(p.numel() for name, p in model.named_parameters() if name.split(".")[0] in ("up", "down", "conv"))
        biases = 64 + 32 + 24
        assert left - biases <= params * (dense - biases) + 1e-6


def test_predicted_losses_are_near_the_measured() -> None:
    model = make()
    plan = plan_for(Budget(params=0.6), model)
    assert plan.measured is not None
    assert plan.measured.dense == 0.0
    assert plan.measured.structured == pytest.approx(plan.predicted_loss, rel=0.5)
    reference = make()
    ids = batches()[0]
    assert not torch.equal(model(ids), reference(ids))
    assert any(isinstance(module, StructuredLinear) for module in model.modules())


def test_refinement_brings_the_prediction_nearer() -> None:
    plain, refined = plan_for(Budget(params=0.4)), plan_for(Budget(params=0.4), refine=4)
    assert plain.measured is not None
    assert refined.measured is not None
    off = [abs(p.predicted_loss / p.measured.structured - 1) for p in (plain, refined) if p.measured is not None]
    assert off[1] < off[0]


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what was kept neither a backward nor a measurement is made again, and the plan is the same."""
    path = tmp_path / "statistics"
    first = plan_for(Budget(params=0.5), refine=2, resume=path)
    calls: list[str] = []
    measured = Loss.of

    def noted(self: Loss, model: nn.Module) -> float:
        calls.append("measured")
        return measured(self, model)

    monkeypatch.setattr(Loss, "of", noted)
    again = plan_for(Budget(params=0.5), refine=2, resume=path, loss_fn=Counted(logits, "logits"))
    assert again == first
    assert len(calls) == 2  # dense, restructured
    assert Counted.sampled == 1  # the one forward that looks for weights that are read elsewhere


class Counted(Distillation):
    """Counts the calls that sample."""

    sampled = 0

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        type(self).sampled += 1
        return super().__call__(model, batch)


def test_calibration_beats_the_weights_alone() -> None:
    """The whitened projection loses less than the plain one."""
    model = make()
    plan = plan_for(Budget(params=0.4), calibration=None, loss_fn=None, model=model)
    assert plan.measured is None
    reference, ids = make(), batches()[0]
    with torch.no_grad():
        plain = DISTILLATION.distance(model, ids, DISTILLATION.reference(reference, ids)).mean()
    calibrated = plan_for(Budget(params=0.4))
    assert calibrated.measured is not None
    assert calibrated.measured.structured < float(plain)


def test_the_solver_is_no_worse_than_uniform_shares() -> None:
    for share in (0.8, 0.6, 0.4):
        best = plan_for(Budget(params=share))
        assert best.predicted_loss <= plan_for(Budget(params=share), strategy="uniform").predicted_loss * (1 + 1e-9)


def test_least_time_under_an_allowed_loss() -> None:
    free = plan_for(Budget(loss=1e9), timing_seconds=0)
    tight = plan_for(Budget(loss=1e-4), timing_seconds=0)
    assert tight.predicted_loss <= 1e-4
    assert tight.met == {"loss": True}
    assert free.total("time") <= tight.total("time")


def test_an_impossible_budget_says_what_is_possible_and_changes_nothing() -> None:
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PlanError, match=r"params .* \(least possible alone: [\d,]+\).* at [\d.]+ times these limits"):
        plan_for(Budget(params=0.01, weight_bytes=0.01), model)
    assert {name: torch.equal(value, before[name]) for name, value in model.state_dict().items()} == dict.fromkeys(
        before, True
    )


def test_overrides_and_exclusions() -> None:
    plan = plan_for(Budget(params=0.9), overrides={"u*": []}, exclude=["conv"])
    assert plan.layers["up"].structure is None
    assert plan.left["conv"] == "it is excluded"
    assert "lm_head" in plan.layers
    assert plan_for(Budget(params=0.9)).left["lm_head"].startswith("it is the head")
    assert set(plan_for(Budget(params=0.9), include=["down"]).layers) == {"down"}


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ArgumentError, match=r"there is no structure 'lowrank'; there are .*low_rank"):
        plan_for(Budget(params=0.5), structures=["lowrank"])
    with pytest.raises(ArgumentError, match="strategy is 'best'; allowed: solver"):
        plan_for(Budget(params=0.5), strategy="best")
    with pytest.raises(ArgumentError, match="calibration and loss_fn go together"):
        plan_for(Budget(params=0.5), loss_fn=None)
    with pytest.raises(ArgumentError, match="refine, resume and sensitivity are of calibration data"):
        plan_for(Budget(params=0.5), calibration=None, loss_fn=None, refine=2)
    with pytest.raises(ArgumentError, match="the strategy 'uniform' cannot seek the least time"):
        plan_for(Budget(params=0.5, loss=1.0), strategy="uniform")
    globs: dict[str, Any] = {"include": ["upp"], "exclude": ["upp"], "overrides": {"upp": []}}
    for argument, patterns in globs.items():
        with pytest.raises(ArgumentError, match=f"{argument} has 'upp', which matches none of the layers .*up"):
            plan_for(Budget(params=0.5), None, **{argument: patterns})
    with pytest.raises(ArgumentError, match="no layer is left"):
        plan_for(Budget(params=0.5), nn.Sequential(nn.ReLU()), calibration=None, loss_fn=None)
    with pytest.raises(ArgumentError, match="timing_seconds is -1; allowed: a number of at least 0"):
        plan_for(Budget(params=0.5), timing_seconds=-1)
    with pytest.raises(ArgumentError, match="kind is 'kl'; allowed: logits"):
        Distillation(logits, "kl")  # type: ignore[arg-type]


def test_a_plan_is_applied_to_another_copy() -> None:
    plan = plan_for(Budget(params=0.6), calibration=None, loss_fn=None)
    first, second = make(), make()
    apply_(first, plan)
    apply_(second, plan)
    ids = batches()[0]
    assert torch.equal(first(ids), second(ids))
    wrong = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(PlanError, match=r"restructures '.*' of .*; in this model: there is no such layer"):
        apply_(wrong, plan)
    assert type(wrong[0]) is nn.Linear


def test_a_restructured_model_trains_compiled_without_graph_breaks() -> None:
    model = make()
    plan_for(Budget(params=0.5), model)
    eager = make()
    eager.load_state_dict(make().state_dict())
    ids = batches()[0]

    def loss(ids: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())

    fast = Rewritten(loss, then="aot_eager")
    value = fast(ids)
    value.backward()
    made = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    loss(ids).backward()
    assert fast.statuses == ["rewritten"]  # the head, which was left dense
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(made[name], parameter.grad, msg=name)


def test_modes_flags_and_random_numbers_are_left_as_they_were() -> None:
    model = make()
    model.down.train(False)
    model.up.weight.requires_grad_(False)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    plan_for(Budget(params=0.5), model)
    assert torch.equal(torch.rand(3), expected)
    assert not model.down.training
    assert model.training
    assert model.embedding.weight.requires_grad
    assert not any(p.requires_grad for name, p in model.up.named_parameters() if name != "bias")

"""Factors follow the weights: of every module that a graph is run with, after every change of them."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import structfly
from structfly.patterns.linear import projection
from structfly.patterns.linear.projection import Projections, Wanted, remembered_losses
from structfly.patterns.low_rank import LowRank
from structfly.patterns.pivoted_low_rank import PivotedLowRank
from structfly.patterns.pixelfly import Pixelfly
from structfly.records.layer import LayerSizes
from tests.compiling import Rewritten
from tests.patterns.linear.layers import Model, assert_structured, planned, projected

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own deprecations
SIZES, STRUCTURE = LayerSizes(20, 12), LowRank(rank=3)
OPTIONS = {"plan": planned(layer=(STRUCTURE, SIZES)), "strict": True}
X = torch.linspace(-1, 1, 80).reshape(4, 20)


def make(seed: int) -> Model:
    torch.manual_seed(seed)
    return Model(nn.Linear(*SIZES)).eval().requires_grad_(False)


def assert_follows(value: Tensor, model: nn.Module) -> None:
    dense = projected(STRUCTURE, model.get_parameter("layer.weight"), torch.float32)
    assert_structured(value, model, {"layer.weight": dense}, X)


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[None]:
    """Calls of a method of LowRank."""
    calls: list[None] = []
    original = getattr(LowRank, name)

    def method(*arguments: Any) -> Any:
        calls.append(None)
        return original(*arguments)

    monkeypatch.setattr(LowRank, name, method)
    return calls


def add(weight: nn.Parameter) -> None:
    weight.add_(torch.ones_like(weight))


def step(weight: nn.Parameter) -> None:
    weight.requires_grad_()
    weight.grad = torch.randn_like(weight)
    torch.optim.SGD([weight], lr=1.0).step()
    weight.grad = None
    weight.requires_grad_(False)


def swap(weight: nn.Parameter) -> None:
    weight.data = torch.randn_like(weight)


def through_data(weight: nn.Parameter) -> None:
    weight.data.mul_(-2)
    structfly.refresh()


CHANGES: dict[str, Callable[[Model], Any]] = {
    "in place": lambda model: add(model.layer.weight),  # type: ignore[arg-type]
    "optimizer": lambda model: step(model.layer.weight),  # type: ignore[arg-type]
    "load_state_dict": lambda model: model.load_state_dict(make(9).state_dict()),
    "load_state_dict, assigned": lambda model: model.load_state_dict(make(9).state_dict(), assign=True),
    "another parameter": lambda model: setattr(model.layer, "weight", make(8).layer.weight),
    "another .data": lambda model: swap(model.layer.weight),  # type: ignore[arg-type]
    "through .data": lambda model: through_data(model.layer.weight),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_weight_that_has_changed_is_projected_again(change: str) -> None:
    model = make(0)
    fast = Rewritten(model, OPTIONS)
    with torch.no_grad():
        before = fast(X)
        assert_follows(before, model)
        CHANGES[change](model)
        after = fast(X)
    assert_follows(after, model)
    assert (after - before).norm() > 0.05


def test_what_is_written_through_data_is_seen_after_a_refresh_only() -> None:
    """This is what refresh is for; were it seen, the function would be idle."""
    model = make(0)
    fast = Rewritten(model, OPTIONS)
    with torch.no_grad():
        before = fast(X)
        model.layer.weight.data.mul_(-2)  # type: ignore[operator]
        assert torch.equal(fast(X), before)
        structfly.refresh()
        assert_follows(fast(X), model)


def test_each_module_that_a_graph_is_run_with_has_factors_of_its_own() -> None:
    models = [make(seed) for seed in range(3)]

    def call(model: nn.Module, x: Tensor) -> Any:
        return model(x)

    fast = Rewritten(call, OPTIONS)
    with torch.no_grad():
        for model in (*models, *models):
            assert_follows(fast(model, X), model)
        add(models[1].layer.weight)  # type: ignore[arg-type]
        for model in models:
            assert_follows(fast(model, X), model)
    assert len(fast.graphs) == 1, "Dynamo no longer shares a graph among modules, so this test shows nothing"


def test_an_unchanged_weight_is_not_projected_again_and_keeps_the_factors_addresses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = nn.Parameter(torch.randn(12, 20))
    projections = Projections(Wanted(STRUCTURE, torch.float32, transposed=False))
    count = counted(monkeypatch, "project")
    first = list(projections.of(weight))
    assert all(mine is theirs for mine, theirs in zip(projections.of(weight), first, strict=True))
    assert len(count) == 1
    with torch.no_grad():
        weight.neg_()
    right, left = projections.of(weight)
    assert len(count) == 2
    assert (right is first[0], left is first[1]) == (True, True)
    torch.testing.assert_close(left @ right, projected(STRUCTURE, weight, torch.float32).float())


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_the_mode_of_a_call_does_not_reach_the_projection(mode: Any) -> None:
    weight = nn.Parameter(torch.randn(12, 20))
    wanted = Wanted(Pixelfly(grid=2, n_factors=1, rank=2), torch.float32, transposed=False)  # with matrix products
    expected = list(Projections(wanted).of(weight))
    other = nn.Parameter(weight.detach().clone())
    with mode():
        factors = Projections(wanted).of(other)
    for factor, other_factor in zip(factors, expected, strict=True):
        assert not factor.is_inference()
        assert not factor.requires_grad
        assert torch.equal(factor, other_factor)


def test_graphs_that_make_the_same_of_a_weight_share_it() -> None:
    weight = nn.Parameter(torch.randn(12, 20))
    wanted = Wanted(STRUCTURE, torch.float32, transposed=False)
    one, two = Projections(wanted).of(weight), Projections(wanted).of(weight)
    assert one[0].data_ptr() != two[0].data_ptr()  # nobody held the first
    first, second = Projections(wanted), Projections(wanted)
    assert first.of(weight) is second.of(weight)
    others = (
        Wanted(STRUCTURE, torch.bfloat16, transposed=False),
        Wanted(STRUCTURE, torch.float32, transposed=True),
        Wanted(PivotedLowRank(rank=3), torch.float32, transposed=False),
    )
    assert all(Projections(other).of(weight) is not first.of(weight) for other in others)


def test_factors_go_with_the_weight_and_with_the_graph() -> None:
    weight = nn.Parameter(torch.randn(12, 20))
    projections = Projections(Wanted(STRUCTURE, torch.float32, transposed=False))
    factor = weakref.ref(projections.of(weight)[0])
    known = len(projection._projections)
    del weight
    gc.collect()
    assert factor() is None
    assert len(projection._projections) < known
    weight = nn.Parameter(torch.randn(12, 20))
    factor = weakref.ref(projections.of(weight)[0])
    del projections
    gc.collect()
    assert factor() is None


@pytest.mark.parametrize("transposed", [False, True])
def test_losses_are_predicted_once_for_a_weight_and_again_when_it_has_changed(
    transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = nn.Parameter(torch.randn(12, 20))
    menu = LowRank.menu(LayerSizes(12, 20) if transposed else LayerSizes(20, 12))
    dense, losses = (weight.t() if transposed else weight), LowRank.losses
    count = counted(monkeypatch, "losses")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for changed in range(3):
            for _ in range(2):
                found = remembered_losses(weight, transposed)(LowRank, menu)
            assert len(count) == changed + 1
            with torch.autocast("cpu", enabled=False):
                assert list(found) == list(losses(menu, dense.detach()))
            if changed == 0:
                weight.add_(1.0)
            else:
                weight.data.mul_(2.0)
                structfly.refresh()


def test_a_copied_model_is_projected_for_itself() -> None:
    model = make(0)
    fast = Rewritten(lambda model, x: model(x), OPTIONS)
    other = copy.deepcopy(model)
    with torch.no_grad():
        add(other.layer.weight)  # type: ignore[arg-type]
        assert_follows(fast(model, X), model)
        assert_follows(fast(other, X), other)

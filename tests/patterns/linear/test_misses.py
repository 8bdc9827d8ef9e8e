"""Which layers are left as they are, and the reason that is given."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from structfly.patterns.linear.reads import TRAINS
from tests.compiling import Rewritten
from tests.patterns.linear.layers import Model

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own deprecations
BUDGET = {"budget": {"params": 0.5}, "strict": True}
ELSEWHERE = "its weight is read by something else than linears, too"
X = torch.linspace(-1, 1, 96).reshape(4, 24)


def run(model: Callable[[Tensor], Any], options: Any = None, x: Tensor = X) -> Rewritten:
    fast = Rewritten(model, options or BUDGET)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
    return fast


class Of(nn.Module):
    """Modules and what is done with them."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **members: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def linear(in_features: int = 24, out_features: int = 24) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features)


def tied() -> nn.Module:
    one, two = linear(), linear()
    two.weight = nn.Parameter(one.weight.data)  # another parameter on the same memory
    return Of(lambda m, x: m.two(m.one(x)), one=one, two=two)


def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return Model(linear())


def other_dtype(dtype: torch.dtype) -> nn.Module:
    weight = nn.Parameter(torch.randn(24, 24).to(dtype), requires_grad=False)
    return Of(lambda m, x: F.linear(x.to(dtype), m.weight).abs(), weight=weight)


@pytest.mark.parametrize(
    ("make", "reasons"),
    [
        (lambda: Of(lambda m, x: m.a(x) + m.a.weight.sum(), a=linear()), [ELSEWHERE]),
        (lambda: Of(lambda m, x: m.a(x) @ m.a.weight, a=linear()), ["as it is in one place, and transposed in"] * 2),
        (lambda: Of(lambda m, x: m.a(m.a.weight)[:4] + x, a=linear()), [ELSEWHERE]),
        (lambda: Of(lambda m, x: m.a(x) * m.a.weight.t()[0].sum(), a=linear()), [ELSEWHERE]),
        (tied, ["shares memory with another input"] * 2),
        (lambda: Model(weight_norm(linear())), ["made in the graph, by"]),
        (lambda: Of(lambda m, x: F.linear(x, m.w * 2), w=nn.Parameter(torch.ones(5, 24))), ["by mul"]),
        (lambda: Of(lambda m, x: x @ m.w.double().float(), w=nn.Parameter(torch.ones(24, 5))), ["made in the graph"]),
        (lambda: other_dtype(torch.complex64), ["its weight is torch.complex64"]),
        (lambda: other_dtype(torch.int64), ["its weight is torch.int64"]),
        (made_in_inference_mode, ["its weight was made under torch.inference_mode()"]),
        (
            lambda: Of(lambda m, x: m.a(x) + 2 * m.up(m.down(x)), a=linear(), up=lora(4, 24), down=lora(24, 4)),
            ["an adapter is added to it"],
        ),
    ],
)  # fmt: skip
def test_left_with_a_reason(make: Callable[[], nn.Module], reasons: list[str]) -> None:
    sites = [site for site in run(make()).sites if site.rule == "linear"]
    assert [site.status for site in sites] == ["missed"] * len(reasons)
    for site, reason in zip(sites, reasons, strict=True):
        assert reason in site.reason


def lora(in_features: int, out_features: int) -> nn.Linear:
    return nn.Linear(in_features, out_features, bias=False)


def test_a_sum_of_two_layers_is_no_adapter() -> None:
    model = Of(lambda m, x: m.a(x) + m.b(torch.tanh(x[:, :8])), a=linear(), b=lora(8, 24))
    fast = Rewritten(model, {**BUDGET, "rewrite": "always"})
    with torch.no_grad():
        fast(X)
    assert fast.statuses == ["rewritten", "rewritten"]


def test_products_of_activations_are_no_layers() -> None:
    def attention(x: Tensor) -> Tensor:
        return torch.softmax(x @ x.t(), -1) @ x

    assert run(attention).sites == []


def test_a_weight_that_is_an_argument_is_left() -> None:
    weight = torch.randn(5, 24)
    fast = Rewritten(lambda x, w: F.linear(x, w), BUDGET)
    fast(X, weight)
    assert "no parameter of a module" in fast.sites[0].reason


def test_the_body_of_a_checkpoint_is_left() -> None:
    layer = linear().requires_grad_(False)
    fast = run(lambda x: checkpoint(layer, x, use_reentrant=False))
    assert [(site.status, "no factors can be added" in site.reason) for site in fast.sites] == [("missed", True)]


def test_a_graph_that_trains_is_left_and_says_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    model = Model(nn.Sequential(linear(), linear()))
    fast = Rewritten(model, BUDGET)
    with caplog.at_level(logging.WARNING, "structfly"):
        fast(X).sum().backward()
    assert [(site.status, site.reason) for site in fast.sites] == [("missed", TRAINS)] * 2
    assert "structfly.restructure_(model, ...) before the optimizer is built" in TRAINS
    assert [record.levelname for record in caplog.records if record.name.startswith("structfly")] == ["WARNING"]
    assert "2 linear layers (layer.0, ...)" in caplog.text


def test_an_input_that_needs_a_gradient_trains() -> None:
    model = Model(linear()).requires_grad_(False)
    fast = Rewritten(model, BUDGET)
    fast(X.clone().requires_grad_())
    assert [site.reason for site in fast.sites] == [TRAINS]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_does_not_train(mode: Any) -> None:
    model = linear()

    def inside(x: Tensor) -> Tensor:
        with mode():
            result: Tensor = model(x)
            return result.clone()

    fast = Rewritten(inside, {**BUDGET, "structures": ["low_rank"]})
    fast(X.clone().requires_grad_())  # gradients are recorded around it
    assert fast.statuses == ["rewritten"]
    (call,) = fast.calls_of(torch.ops.structfly.low_rank_v3.default)
    assert call.args[4] is False  # nothing is kept for a backward
    fast = Rewritten(model, BUDGET)
    with mode():
        fast(X)
    assert fast.statuses == ["rewritten"]


@pytest.mark.parametrize("options", [{}, {"structures": ["low_rank"]}, {"budget": {"loss_memory": "1MiB"}}])
def test_without_a_budget_of_layers_nothing_is_said(options: Any) -> None:
    assert run(Model(linear()), {**options, "rewrite": "always"}).sites == []


def test_the_rule_can_be_switched_off_for_a_layer() -> None:
    model = nn.Sequential(linear(), nn.Tanh(), linear())
    fast = Rewritten(model, {**BUDGET, "overrides": {"0": {"rules": {"linear": False}}}})
    with torch.no_grad():
        fast(X)
    assert fast.statuses == ["kept", "rewritten"]
    assert fast.sites[1].costs["params"] <= 0.5 * 24 * 24  # of this layer alone


@pytest.mark.parametrize("between", [torch.tanh, lambda x: x])
def test_what_the_loss_rule_takes_it_keeps(between: Callable[[Tensor], Tensor]) -> None:
    body, classifier = linear(), linear(24, 200)
    labels = torch.arange(4)

    def loss(x: Tensor) -> Tensor:
        return F.cross_entropy(classifier(between(body(x))), labels)

    fast = Rewritten(loss, {**BUDGET, "rewrite": "always"})
    with torch.no_grad():
        fast(X)
    assert [(site.rule, site.status) for site in fast.sites] == [
        ("linear", "rewritten"),
        ("linear_cross_entropy", "rewritten"),
    ]
    with_its_weight = Rewritten(
        lambda x: loss(x) + F.linear(x, classifier.weight).sum(), {**BUDGET, "rewrite": "always"}
    )
    with torch.no_grad():
        with_its_weight(X)
    missed = [site.reason for site in with_its_weight.sites if site.status == "missed"]
    assert missed == ["another rule takes part of what would be rewritten"]
    fast = Rewritten(loss, {**BUDGET, "rewrite": "always", "rules": {"linear_cross_entropy": False}})
    with torch.no_grad():
        fast(X)
    statuses = {(site.rule, site.name): site.status for site in fast.sites}
    assert sorted(statuses.values()) == ["kept", "rewritten", "rewritten"]


def test_a_weight_whose_sizes_vary_is_left() -> None:
    model = Model(linear())
    varying = {"force_parameter_static_shapes": False, "force_nn_module_property_static_shapes": False}
    with torch._dynamo.config.patch(varying), torch.no_grad():
        fast = Rewritten(model, BUDGET, dynamic=True)
        fast(X)
    assert ["sizes vary from call to call" in site.reason for site in fast.sites] == [True]

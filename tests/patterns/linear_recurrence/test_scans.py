"""torch's own scans become the op before they are differentiated, and have the loop's gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan

from tests.compiling import Rewritten
from tests.oracle import assert_like_eager
from tests.patterns.linear_recurrence.programs import inputs

OP = torch.ops.structfly.linear_recurrence_v1.default
# Eager runs torch's scan through a compiler of its own, which looks at gradients of what is no leaf.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
SCAN: Any = torch.ops.higher_order.associative_scan


def pointwise(function: Callable[..., Sequence[Tensor]], leaves: list[Tensor], dim: int = 0) -> list[Tensor]:
    """What ``associative_scan(..., combine_mode="pointwise")`` puts into a graph; on a CPU torch refuses to call it."""
    made = SCAN(function, [leaf.movedim(dim, 0) for leaf in leaves], ())
    return [each.movedim(0, dim) for each in made]


def combine(a: Tensor, b: Tensor, a_right: Tensor, b_right: Tensor) -> list[Tensor]:
    return [a * a_right, a_right * b + b_right]


def loop(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    h, hs = torch.zeros_like(h0), []
    for t in range(f.shape[1]):
        h = f[:, t] * h + z[:, t]
        hs.append(h)
    return torch.stack(hs, 1)


def associative(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    return pointwise(combine, [f, z], 1)[1]


def associative_the_other_way_round(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    def combine(b: Tensor, a: Tensor, b_right: Tensor, a_right: Tensor) -> list[Tensor]:
        return [b_right + b * a_right, a_right * a]

    return pointwise(combine, [z, f], 1)[0]


@pytest.mark.parametrize("function", [associative, associative_the_other_way_round])
def test_associative_scan_has_the_gradients_of_the_loop(function: Callable[..., Tensor]) -> None:
    fast = Rewritten(function)
    expected = [each.double() if each.is_floating_point() else each for each in inputs()]
    leaves = [each.detach().requires_grad_() for each in expected[:2]]
    exact = loop(*leaves, *expected[2:])
    theirs = torch.autograd.grad(exact.square().sum(), leaves)
    f, z, h0, mask = inputs()
    output = fast(f, z, h0, mask)
    mine = torch.autograd.grad(output.square().sum(), [f, z])
    assert fast.statuses == ["rewritten"]
    assert len(fast.calls_of(OP)) == 1
    torch.testing.assert_close(output.double(), exact, rtol=1e-5, atol=1e-5)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def test_what_is_replaced_has_the_wrong_gradient() -> None:
    """When this fails, torch's gradient has become right, and the rule need not insist."""
    f, z, h0, mask = inputs()
    torch._dynamo.reset()
    theirs = torch.compile(associative, backend="aot_eager")(f, z, h0, mask)
    (wrong,) = torch.autograd.grad(theirs.square().sum(), f)
    (right,) = torch.autograd.grad(loop(f, z, h0, mask).square().sum(), f)
    assert (wrong - right).norm() > 0.5 * right.norm()


def test_a_wrong_gradient_is_replaced_whatever_it_costs() -> None:
    fast = Rewritten(associative, {"strict": True})
    fast(*inputs())
    (site,) = fast.sites
    assert site.status == "rewritten"
    assert "the gates' gradient would be wrong" in site.reason


def test_without_gradients_costs_decide() -> None:
    fast = Rewritten(associative, {"strict": True})
    with torch.no_grad():
        fast(*inputs())
    assert fast.statuses == ["kept"]


def test_products_of_gates_are_made_too() -> None:
    def both(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
        products, states = pointwise(combine, [f, z], 1)
        return products + states

    def expected(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
        return torch.cumprod(f, 1) + loop(f, z, h0, mask)

    fast = Rewritten(both)
    f, z, h0, mask = inputs()
    mine, theirs = fast(f, z, h0, mask), expected(f, z, h0, mask)
    torch.testing.assert_close(mine, theirs)
    for one, other in zip(*(torch.autograd.grad(each.sum(), [f, z]) for each in (mine, theirs)), strict=True):
        torch.testing.assert_close(one, other)
    assert len(fast.calls_of(OP)) == 2


# ----------------------------------------------------------------------------------------------------------------- scan


def step(h: Tensor, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    h = x[0] * h + (1 - x[0]) * x[1]
    return h, h.clone()


def scanned(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    last, states = scan(step, h0, (f, z), dim=1)
    return torch.cat([states, last.unsqueeze(1)], 1)


def scanned_backwards(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    last, states = scan(step, h0, (f, z), dim=1, reverse=True)
    return torch.cat([states, last.unsqueeze(1)], 1)


def with_lifted_values(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    decay = h0[0].sigmoid()

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h = torch.lerp(x, h, decay)
        return h, (torch.tanh(h) * x, x * 2)

    _, (one, other) = scan(step, h0, z, dim=1)
    result: Tensor = one + other
    return result


@pytest.mark.parametrize("function", [scanned, scanned_backwards, with_lifted_values])
@pytest.mark.parametrize("then", ["eager", "aot_eager"])
def test_scan_is_rewritten(function: Callable[..., Tensor], then: str) -> None:
    fast = Rewritten(function, then=then)
    assert_like_eager(fast, function, inputs())
    assert fast.statuses == ["rewritten"], fast.sites
    assert len(fast.calls_of(OP)) == 1


def squashed(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    result: Tensor = scan(lambda h, x: (torch.tanh(h * x), h * x), h0, z, dim=1)[0]
    return result


def two_states(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    result: Tensor = scan(lambda h, x: ((h[0] * x, h[1] + x), h[0] * 1.0), (h0, h0 * 2), z, dim=1)[0][1]
    return result


def states_before(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    result: Tensor = scan(lambda h, x: (h * x, h * 2), h0, z, dim=1)[1]
    return result


def memoryless(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    result: Tensor = scan(lambda h, x: (x * 2, x.clone()), h0, z, dim=1)[0]
    return result


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (squashed, "tanh of the state"),
        (two_states, "2 states"),
        (states_before, "made of the state before it"),
        (memoryless, "does not depend on the state"),
    ],
)
def test_near_misses(function: Callable[..., Tensor], reason: str) -> None:
    fast = Rewritten(function)
    assert_like_eager(fast, function, inputs())
    assert fast.statuses == ["missed"]
    assert reason in fast.sites[0].reason

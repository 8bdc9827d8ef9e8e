"""Recurrences that are not made with a projection, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from structfly.lowering.linear_recurrence.projected_op import PROJECTED
from structfly.nn import QRNN
from structfly.ops import linear_recurrence
from tests.compiling import Rewritten
from tests.patterns.projected_recurrence.cases import (
    BATCH,
    INPUTS,
    POOLING,
    STEPS,
    UNITS,
    arguments,
    own,
    pooled,
    without_gradients,
)


def projection_is_returned(x: Tensor, w: Tensor, b: Tensor) -> Any:
    y = F.linear(x, w, b)
    return pooled(y), y


def gate_is_read(x: Tensor, w: Tensor, b: Tensor) -> Any:
    z, f, o = F.linear(x, w, b).chunk(3, -1)
    return linear_recurrence(f, z, output_gate=o, **POOLING)[0] + f.sigmoid()


def projection_is_read_twice(x: Tensor, w: Tensor, b: Tensor) -> Any:
    y = F.linear(x, w, b)
    return pooled(y), pooled(y, reverse=True)


def with_resets(x: Tensor, w: Tensor, b: Tensor) -> Any:
    return pooled(F.linear(x, w, b), reset=x[..., 0] > 0)


def packed(x: Tensor, w: Tensor, b: Tensor) -> Any:
    return pooled(F.linear(x[:1], w, b), offsets=torch.tensor([0, 3, STEPS]))


def begun_with_it(x: Tensor, w: Tensor, b: Tensor) -> Any:
    y = F.linear(x, w, b)
    return pooled(y, initial_state=y[:, 0, :UNITS].tanh())


def without_tanh(x: Tensor, w: Tensor, b: Tensor) -> Any:
    return pooled(F.linear(x, w, b), input_activation="none")


def without_complement(x: Tensor, w: Tensor, b: Tensor) -> Any:
    return pooled(F.linear(x, w, b), complement=False)


def projections_of_their_own(x: Tensor, w: Tensor, b: Tensor) -> Any:
    z, f, o = (F.linear(x, part) for part in w.chunk(3))
    return linear_recurrence(f, z, output_gate=o, **POOLING)[0]


def of_more_than_it_takes(x: Tensor, w: Tensor, b: Tensor) -> Any:
    z, f, _ = F.linear(x, w, b).chunk(3, -1)
    return linear_recurrence(f, z, **POOLING)[0]


def with_one_number_for_all(x: Tensor, w: Tensor, b: Tensor) -> Any:
    return pooled(F.linear(x, w, b[:1]))


def keeping_states(x: Tensor, w: Tensor, b: Tensor) -> Any:
    return torch.ops.structfly.joint_linear_recurrence_v1.default(
        F.linear(x, w, b), "zfo", None, None, None, True, True, True, False, True
    )


def with_an_update(x: Tensor, w: Tensor, b: Tensor) -> Any:
    return pooled(F.linear(x, w, b) + F.linear(F.linear(x, w[:1]), b[:, None]))


MISSES: Mapping[Callable[..., Any], str] = {
    projection_is_returned: "not only the recurrence reads what the linear makes, but output",
    gate_is_read: "not only the recurrence reads what the linear makes, but sigmoid too",
    projection_is_read_twice: "not only the recurrence reads what the linear makes, but called_v1_joint",
    with_resets: "states are reset, or sequences are packed",
    packed: "states are reset, or sequences are packed",
    begun_with_it: "the states it begins with are made of what the linear makes",
    without_tanh: "made in one are gates that are sigmoids, inputs that are a tanh, and 1 - f",
    without_complement: "made in one are gates that are sigmoids, inputs that are a tanh, and 1 - f",
    projections_of_their_own: "gates and input are not the slices, all that there are and of one size",
    of_more_than_it_takes: "gates and input are not the slices, all that there are and of one size",
    with_one_number_for_all: "the bias has shape (1,); taken is one with a number for each",
    keeping_states: "not only the outputs and the final states are used, but what is kept for a backward",
    with_an_update: "a low-rank update is added to what the linear makes",
}


@pytest.mark.parametrize(("function", "reason"), MISSES.items())
def test_near_misses_have_a_reason(function: Callable[..., Any], reason: str) -> None:
    given = arguments(dtype=torch.float32)
    fast = Rewritten(function)
    torch.testing.assert_close(without_gradients(fast, *given), function(*given))
    assert not fast.calls_of(PROJECTED)
    assert {site.status for site in own(fast)} == {"missed"}
    assert all(site.reason.startswith(reason) for site in own(fast)), own(fast)


@pytest.mark.parametrize("learned", [0, 1, 3])
def test_what_is_differentiated_is_left(learned: int) -> None:
    def layer(x: Tensor, w: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return pooled(F.linear(x, w, b), initial_state=c)

    given = [*arguments(dtype=torch.float32), torch.zeros(BATCH, UNITS)]
    given[learned].requires_grad_()
    fast = Rewritten(layer, then="aot_eager")
    fast(*given).sum().backward()
    (site,) = own(fast)
    reason = "this graph trains, and the recurrence's gradient takes what the linear makes"
    assert (site.status, site.reason) == ("missed", reason)
    torch._dynamo.reset()
    fast = Rewritten(layer)
    without_gradients(fast, *given)
    assert [site.status for site in own(fast)] == ["rewritten"]


def test_what_no_linear_makes_is_none_of_its_concern() -> None:
    fast = Rewritten(lambda y: pooled(y * 2.0))
    without_gradients(fast, torch.randn(BATCH, STEPS, 3 * UNITS))
    assert not own(fast)


@pytest.mark.filterwarnings("ignore")  # torch's own deprecations
def test_a_layer_that_trains_is_as_it_was() -> None:
    layer = QRNN(INPUTS, UNITS, window=2)
    fast = Rewritten(layer, then="aot_eager")
    x = torch.randn(BATCH, 9, INPUTS, requires_grad=True)
    gradients = [torch.autograd.grad(each(x)[0].sum(), [x, *layer.parameters()]) for each in (fast, layer)]
    torch.testing.assert_close(*gradients)
    assert not fast.calls_of(PROJECTED)

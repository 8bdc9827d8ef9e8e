"""Recurrences by cumulative sums become the op where that is asked for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structfly.records import SiteReport
from tests.compiling import ALWAYS, Rewritten
from tests.oracle import assert_like_eager
from tests.patterns.linear_recurrence.programs import any_inputs, inputs, rewritten

OP = torch.ops.structfly.linear_recurrence_v1.default
ON = {**ALWAYS, "rules": {"cumulative_recurrence": True}}
Program = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def logarithms_with_a_first_state(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    """As minGRU has it: the state before the first step is the first input."""
    values = torch.cat([h0.abs().log().unsqueeze(1), z.abs().log()], 1)
    sums = F.pad(f.log(), (0, 0, 1, 0)).cumsum(1)
    return (sums + (values - sums).logcumsumexp(1)).exp()[:, -z.shape[1] :]


def logarithms(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    sums = torch.cumsum(f.log(), -2)
    return torch.exp(torch.logcumsumexp(z.abs().log() - sums, dim=-2) + sums)


def min_gru(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    sums = (-F.softplus(f)).cumsum(dim=1)
    return (sums + (z - F.softplus(-f) - sums).logcumsumexp(dim=1)).exp()


def log_sigmoids(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    gates = torch.exp(torch.cumsum(F.logsigmoid(f), 1))
    return gates * torch.cumsum(z / gates, 1)


def products(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    gates = f.cumprod(1)
    return (z / gates).cumsum(1) * gates


def products_made_twice(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    return torch.cumprod(f, 1) * torch.cumsum(z * torch.reciprocal(torch.cumprod(f, 1)), 1)


def exponentials(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    sums = f.log().cumsum(1)
    return sums.exp() * (torch.exp(-sums) * z).cumsum(1)


def one_over(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    gates = torch.cumprod(f, dim=1)
    return gates * (z * (1 / gates)).cumsum(1)


def products_from_a_state(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    gates = f.cumprod(1)
    return gates * (h0.unsqueeze(1) + (z / gates).cumsum(1))


def exponentials_from_a_state(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    sums = f.log().cumsum(1)
    return sums.exp() * ((torch.exp(-sums) * z).cumsum(1) + h0[:, None].expand(-1, z.shape[1], -1))


PROGRAMS: list[Program] = [
    products_from_a_state,
    exponentials_from_a_state,
    logarithms,
    logarithms_with_a_first_state,
    min_gru,
    log_sigmoids,
    products,
    products_made_twice,
    exponentials,
    one_over,
]


@settings(deadline=None, max_examples=25)
@given(program=st.sampled_from(PROGRAMS), drawn=any_inputs())
def test_cumulative_forms_are_rewritten(program: Program, drawn: list[Tensor]) -> None:
    fast = rewritten(program, drawn, ON)
    assert len(fast.calls_of(OP)) == 1


@pytest.mark.parametrize("program", [min_gru, log_sigmoids])
def test_gates_of_logits_stay_logits(program: Program) -> None:
    fast = Rewritten(program, ON)
    assert_like_eager(fast, program, inputs())
    (node,) = fast.calls_of(OP)
    assert node.args[8] is True


@pytest.mark.parametrize("program", [products, logarithms])
def test_states_are_there_where_eager_has_none(program: Program) -> None:
    f, z, h0, mask = inputs(steps=9)
    with torch.no_grad():
        f[:, 3] = 0.0
        made, eager = Rewritten(program, ON)(f, z, h0, mask), program(f, z, h0, mask)
    z = z.abs() if program is logarithms else z
    state, states = torch.zeros_like(h0), []
    for t in range(9):
        state = f[:, t] * state + z[:, t]
        states.append(state)
    assert not eager[:, 3:].isfinite().any()
    torch.testing.assert_close(made, torch.stack(states, 1))


def report_of(program: Program, options: dict[str, object]) -> SiteReport:
    fast = Rewritten(program, options)
    assert_like_eager(fast, program, inputs())
    assert not fast.calls_of(OP)
    (site,) = fast.sites
    return site


def test_it_is_off_unless_it_is_named() -> None:
    site = report_of(products, dict(ALWAYS))
    assert site.status == "kept"
    assert "cumulative_recurrence is switched off here" in site.reason


def test_a_gate_for_all_channels_is_a_miss() -> None:
    def program(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
        gates = f[0].cumprod(0)
        return gates * (z / gates).cumsum(0)

    fast = Rewritten(program, ON)
    assert_like_eager(fast, program, inputs())
    assert [(site.status, "the gate has fewer dimensions" in site.reason) for site in fast.sites] == [("missed", True)]


def along_other_dimensions(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    gates = f.cumprod(1)
    return gates * (z / gates).cumsum(2)


def of_other_gates(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    return f.cumprod(1) * (z / (f + 1).cumprod(1)).cumsum(1)


def sums_of_other_sums(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    sums = f.log().cumsum(1)
    return (sums + (z - 2 * sums).logcumsumexp(1)).exp()


def a_quotient_that_is_rounded(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    gates = f.cumprod(1)
    return gates * torch.div(z, gates, rounding_mode="floor").cumsum(1)


def an_inverse_that_is_not_negative(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    sums = f.log().cumsum(1)
    return sums.exp() * (z * torch.exp(sums)).cumsum(1)


def with_something_at_each_step(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    gates = f.cumprod(1)
    return gates * (z.exp() + (z / gates).cumsum(1))


def with_something_for_each_channel(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    gates = f.cumprod(1)
    return gates * (z[..., 0].unsqueeze(2) + (z / gates).cumsum(1))


def with_a_multiple(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    gates = f.cumprod(1)
    return gates * torch.add((z / gates).cumsum(1), h0.unsqueeze(1), alpha=2)


@pytest.mark.parametrize(
    "program",
    [
        with_something_at_each_step,
        with_something_for_each_channel,
        with_a_multiple,
        along_other_dimensions,
        of_other_gates,
        sums_of_other_sums,
        a_quotient_that_is_rounded,
        an_inverse_that_is_not_negative,
    ],
)
def test_what_is_almost_one_is_left_alone(program: Program) -> None:
    fast = Rewritten(program, ON)
    assert_like_eager(fast, program, inputs())
    assert not fast.calls_of(OP)

"""Loops that are almost recurrences are left alone, and the report says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.compiling import Rewritten
from tests.oracle import assert_like_eager
from tests.patterns.linear_recurrence.programs import inputs

OP = torch.ops.structfly.linear_recurrence_v1.default
Program = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class NearMiss(NamedTuple):
    """A program, and what the report must say."""

    program: Program
    reason: str


NEAR_MISSES: dict[str, NearMiss] = {}


def near_miss(reason: str) -> Callable[[Program], Program]:
    def register(program: Program) -> Program:
        NEAR_MISSES[program.__name__] = NearMiss(program, reason)
        return program

    return register


def looped(step: Callable[..., Tensor], f: Tensor, z: Tensor, h: Tensor, *others: Tensor) -> Tensor:
    hs = []
    for t in range(f.shape[1]):
        h = step(f[:, t], z[:, t], h, *(other[:, t] for other in others))
        hs.append(h)
    return torch.stack(hs, 1)


@near_miss("tanh of the state, which is not affine in it")
def squashed(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    return looped(lambda f, z, h: torch.tanh(f * h + z), f, z, h0)


@near_miss("a matrix mixes its channels")
def mixed_channels(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    return looped(lambda f, z, h: h @ z[0].diag() + f, f, z, h0)


@near_miss("a product of the state with itself")
def squared(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    return looped(lambda f, z, h: f * h * h + z, f, z, h0)


@near_miss("the weight of a lerp depends on the state")
def gate_of_the_state(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    return looped(lambda f, z, h: torch.lerp(f, z, h), f, z, h0)


@near_miss("where a condition depends on the state")
def condition_of_the_state(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    return looped(lambda f, z, h: torch.where(h > 0, f * h, z), f, z, h0)


@near_miss("takes more than the state before it")
def second_order(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    older, h, hs = h0, h0, []
    for t in range(f.shape[1]):
        older, h = h, f[:, t] * h + 0.5 * older + z[:, t]
        hs.append(h)
    return torch.stack(hs, 1)


@near_miss("detached in every step")
def truncated(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    return looped(lambda f, z, h: f * h.detach() + z, f, z, h0)


@near_miss("a reset that differs between channels")
def reset_by_channel(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    return looped(lambda f, z, h: torch.where(z > 1, 0.0, f * h) + z, f, z, h0)


@near_miss("the state is reset in one term of a sum")
def partly_reset(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    return looped(lambda f, z, h, m: f * h.masked_fill(m, 0.0) + 0.1 * h + z, f, z, h0, mask.unsqueeze(-1))


@near_miss("the state is reset in one case of a choice")
def reset_in_one_case(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    return looped(lambda f, z, h, m: torch.where(z > 0, f * h.masked_fill(m, 0.0), h), f, z, h0, mask.unsqueeze(-1))


@near_miss("does not depend on the state before it")
def overwritten(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    return looped(lambda f, z, h: (h - h.clone() * 1.0) * 0.0 + f * z, f, z, h0)


@near_miss("cumsum is not known to be the same for all steps")
def cumulative_inside(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    return looped(lambda f, z, h: f * h + z.cumsum(-1), f, z, h0)


@near_miss("writes into a state that")
def in_place(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        h, hs = torch.zeros_like(h0), []
        for t in range(f.shape[1]):
            h = h.mul_(f[:, t]).add_(z[:, t])
            hs.append(h)
        return torch.stack(hs, 1)


@near_miss("writes into a tensor that the nodes of this site read")
def input_overwritten(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    z = z * 1.0
    h, hs = h0, []
    for t in range(f.shape[1]):
        h = f[:, t] * h + z[:, t]
        hs.append(h)
        z.add_(1.0)
    return torch.stack(hs, 1)


@near_miss("gradients or autocast are switched within the loop")
def partly_without_gradients(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    h, hs = h0, []
    for t in range(f.shape[1]):
        with torch.no_grad():
            gate = f[:, t].sigmoid()
        h = gate * h + z[:, t]
        hs.append(h)
    return torch.stack(hs, 1)


@near_miss("states of torch.complex64")
def complex_states(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    return looped(lambda f, z, h: f * h + z, torch.complex(f, z), torch.complex(z, f), torch.complex(h0, h0)).abs()


@near_miss("inside a torch.func transform")
def inside_vmap(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    def one(f: Tensor, z: Tensor, h: Tensor) -> Tensor:
        hs = []
        for t in range(f.shape[0]):
            h = f[t] * h + z[t]
            hs.append(h)
        return torch.stack(hs)

    result: Tensor = torch.vmap(one)(f, z, h0)
    return result


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss_is_left_alone_and_says_why(name: str) -> None:
    near = NEAR_MISSES[name]
    fast = Rewritten(near.program)
    assert_like_eager(fast, near.program, inputs())
    assert not fast.calls_of(OP)
    assert set(fast.statuses) == {"missed"}, fast.sites
    assert any(near.reason in site.reason for site in fast.sites), fast.sites
    assert "test_misses" in fast.sites[0].source


def three_slices(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    for t in range(3):
        h0 = f[:, t] * h0 + z[:, t]
    return h0


def residual_layers(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    one, two, three, four = f[:, :4].unbind(1)
    for _ in range(6):
        one = one + torch.tanh(one * two) * three + four
    return one


@pytest.mark.parametrize("program", [three_slices, residual_layers])
def test_what_is_no_loop_over_time_is_not_reported(program: Program) -> None:
    fast = Rewritten(program)
    assert_like_eager(fast, program, inputs())
    assert fast.sites == []


def two_states(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    one, other, hs = h0, h0, []
    for t in range(f.shape[1]):
        one = f[:, t] * one + z[:, t]
        other = torch.tanh(z[:, t]) * other + one
        hs.append(other)
    return torch.stack(hs, 1)


def test_a_loop_beside_another_is_rewritten_and_the_one_made_of_it_is_not() -> None:
    fast = Rewritten(two_states)
    assert_like_eager(fast, two_states, inputs())
    assert sorted(fast.statuses) == ["missed", "rewritten"]
    assert any("or another loop's" in site.reason for site in fast.sites)

"""Custom autograd functions around recurrences: forward and backward become the op, each by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.compiling import Rewritten
from tests.oracle import assert_like_eager
from tests.patterns.linear_recurrence.programs import inputs

OP = torch.ops.structfly.linear_recurrence_v1.default


def by_loop(f: Tensor, z: Tensor) -> Tensor:
    h, states = torch.zeros_like(z[:, 0]), []
    for t in range(z.shape[1]):
        h = f[:, t] * h + z[:, t]
        states.append(h)
    return torch.stack(states, 1)


class Loops(torch.autograd.Function):
    """A loop each way, in place of a tape."""

    @staticmethod
    def forward(ctx: Any, f: Tensor, z: Tensor) -> Tensor:
        states = by_loop(f, z)
        ctx.save_for_backward(f, states)
        return states

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
        f, states = ctx.saved_tensors
        passed, gradients = torch.zeros_like(upstream[:, 0]), []
        later = torch.cat([f[:, 1:], torch.zeros_like(f[:, :1])], 1)
        for t in reversed(range(f.shape[1])):
            passed = later[:, t] * passed + upstream[:, t]
            gradients.append(passed)
        gradient = torch.stack(gradients[::-1], 1)
        before = torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], 1)
        return gradient * before, gradient


def program(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    states: Tensor = Loops.apply(f, z)  # type: ignore[no-untyped-call]
    return states.tanh()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo does
@pytest.mark.parametrize("then", ["eager", "aot_eager"])
def test_both_bodies_are_rewritten(then: str) -> None:
    fast = Rewritten(program, then=then)
    assert_like_eager(fast, program, inputs())
    assert fast.statuses == ["rewritten"] * 2, fast.sites
    assert len(fast.calls_of(OP)) == 2

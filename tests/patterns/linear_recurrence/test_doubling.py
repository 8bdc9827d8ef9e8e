"""Recurrences by doubling become the op where they reach back to the first step, and are misses where they do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.compiling import Rewritten
from tests.oracle import assert_like_eager
from tests.patterns.linear_recurrence.programs import inputs

OP = torch.ops.structfly.linear_recurrence_v1.default
Shift = Callable[[Tensor, int, float], Tensor]

SHIFTS: dict[str, Shift] = {
    "cat": lambda x, k, fill: torch.cat([torch.full_like(x[:, :k], fill), x[:, :-k]], 1),
    "cat of zeros": lambda x, k, fill: torch.cat([torch.zeros_like(x[:, :k]), x[:, :-k]], dim=1),
    "cat of new": lambda x, k, fill: torch.cat([x.new_zeros(x.shape[0], k, x.shape[2]), x[:, : x.shape[1] - k]], 1),
    "pad": lambda x, k, fill: F.pad(x[:, :-k], (0, 0, k, 0), value=fill),
    "pad without a value": lambda x, k, fill: F.pad(x[..., :-k, :], (0, 0, k, 0)),
    "narrow": lambda x, k, fill: F.pad(x.narrow(1, 0, x.shape[1] - k), (0, 0, k, 0), "constant", fill),
}
ROUNDS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "sum": lambda z, f, before: z + f * before,
    "sum the other way": lambda z, f, before: before * f + z,
    "addcmul": lambda z, f, before: torch.addcmul(z, f, before),
}


def doubling(shift: str = "cat", round: str = "sum", limit: int | None = None) -> Callable[..., Tensor]:
    def function(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
        k = 1
        while k < (limit or z.shape[1]):
            z = ROUNDS[round](z, f, SHIFTS[shift](z, k, 0.0))
            f = f * SHIFTS[shift](f, k, 1.0)
            k *= 2
        return z

    return function


@settings(deadline=None, max_examples=15)
@given(
    shift=st.sampled_from(list(SHIFTS)),
    round=st.sampled_from(list(ROUNDS)),
    steps=st.sampled_from((3, 4, 5, 8, 9, 16, 17)),
    dtype=st.sampled_from((torch.float32, torch.float64)),
)
def test_doubling_is_rewritten(shift: str, round: str, steps: int, dtype: torch.dtype) -> None:
    function = doubling(shift, round)
    fast = Rewritten(function)
    assert_like_eager(fast, function, inputs(steps=steps, dtype=dtype), dtype)
    assert fast.statuses == ["rewritten"], fast.sites
    assert len(fast.calls_of(OP)) == 1


def test_activations_before_it_are_made_by_the_op() -> None:
    def function(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
        return doubling()(torch.sigmoid(f), torch.tanh(z), h0, mask)

    fast = Rewritten(function, then="aot_eager")
    assert_like_eager(fast, function, inputs())
    (node,) = fast.calls_of(OP)
    assert node.args[8:10] == (True, True)


@pytest.mark.parametrize("limit", [4, 8])
def test_a_truncated_doubling_is_a_miss(limit: int) -> None:
    function = doubling("pad", limit=limit)
    fast = Rewritten(function)
    assert_like_eager(fast, function, inputs(steps=9))
    (site,) = fast.sites
    assert site.status == "missed"
    assert f"reaches back {limit} of 9 steps" in site.reason


def wrong_stride(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    for k in (1, 2, 3, 8):
        z = z + f * SHIFTS["cat"](z, k, 0.0)
        f = f * SHIFTS["cat"](f, k, 1.0)
    return z


def gates_of_other_rounds(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    for k in (1, 2, 4, 8):
        z = z + f * SHIFTS["cat"](z, k, 0.0)
    return z


@pytest.mark.parametrize("function", [wrong_stride, gates_of_other_rounds])
def test_other_rounds_are_left_alone(function: Callable[..., Tensor]) -> None:
    fast = Rewritten(function)
    assert_like_eager(fast, function, inputs(steps=9))
    assert not fast.calls_of(OP)


def one_after_another(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    """The second sees two steps of the first, whose states others use as well."""
    first = doubling()(f, z, h0, mask)
    seen = F.pad(first[:, :-1], (0, 0, 1, 0)) + first
    return doubling()(f * 0.5, seen, h0, mask) * first


def with_one_gate(f: Tensor, z: Tensor, h0: Tensor, mask: Tensor) -> Tensor:
    one, other = z, z.flip(1)
    for k in (1, 2, 4, 8):
        one = one + f * SHIFTS["pad"](one, k, 0.0)
        other = other + f * SHIFTS["pad"](other, k, 0.0)
        f = f * SHIFTS["pad"](f, k, 1.0)
    return one - other


@pytest.mark.parametrize("function", [one_after_another, with_one_gate])
def test_two_recurrences_in_one_graph(function: Callable[..., Tensor]) -> None:
    fast = Rewritten(function)
    assert_like_eager(fast, function, inputs(steps=9), roundings=32)
    assert fast.statuses == ["rewritten", "rewritten"], fast.sites
    assert len(fast.calls_of(OP)) == 2

"""The op of sequences that lie side by side, against the reference of their slices in float64."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from structfly.errors import UnsupportedError
from structfly.lowering.linear_recurrence.arguments import Arguments, JointArguments
from structfly.lowering.linear_recurrence.op import joint_linear_recurrence, linear_recurrence
from tests.lowering.linear_recurrence.cases import (
    calls,
    joint_of,
    make_call,
    run_joint,
    run_joint_reference,
    upstream_for,
)
from tests.oracle import assert_like_eager

OP = torch.ops.structfly.joint_linear_recurrence_v1
BACKWARD = torch.ops.structfly.joint_linear_recurrence_backward_v1
FULL: dict[str, Any] = {"weight": "gate", "output_gate": True, "sigmoid": True, "tanh": True}


def letters_of(call: Arguments) -> str:
    return "fz" + "i" * (call.input_gate is not None) + "o" * (call.output_gate is not None)


@st.composite
def joint_calls(draw: st.DrawFn) -> tuple[Arguments, JointArguments]:
    """Calls of all kinds, their sequences side by side in any order and layout."""
    call = draw(calls())
    joint = joint_of(call, "".join(draw(st.permutations(letters_of(call)))))
    if draw(st.booleans()):  # time last, or of a wider tensor
        tensor = joint.joint.detach().transpose(1, 2).contiguous().transpose(1, 2)
        joint = joint._replace(joint=tensor.requires_grad_(joint.joint.requires_grad))
    return call, joint


def check(call: Arguments, joint: JointArguments) -> None:
    fast, reference = partial(run_joint, joint), partial(run_joint_reference, joint)
    assert_like_eager(fast, reference, joint.differentiable, joint.joint.dtype, upstream_for(call), 8)


@settings(max_examples=100)
@given(both=joint_calls())
def test_as_accurate_as_the_loop(both: tuple[Arguments, JointArguments]) -> None:
    check(*both)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"weight": "complement", "sigmoid": True, "tanh": True}, FULL])
def test_as_accurate_as_the_loop_on_cuda(dtype: torch.dtype, options: dict[str, Any]) -> None:
    for reverse in (False, True):
        call = make_call(2, 1300, 70, dtype=dtype, reverse=reverse, reset=0.01, device="cuda", **options)
        check(call, joint_of(call, letters_of(call)[::-1]))


@pytest.mark.parametrize("order", ["zfoi", "iozf"])
def test_it_is_the_op_of_the_slices(order: str) -> None:
    joint = joint_of(make_call(2, 41, 3, **FULL), order)
    together, apart = joint_linear_recurrence(*joint), linear_recurrence(*joint.separate)
    assert torch.equal(together.output, apart.output)
    assert torch.equal(together.final, apart.final)
    leaves = [each for each in joint.differentiable if each is not None]
    for one, other in zip(
        *(torch.autograd.grad(each.output.sum() + each.final.sum(), leaves) for each in (together, apart)), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("options", [{}, FULL, {"lengths": (5, 0, 7)}, {"reset": 0.1}])
def test_opcheck(options: dict[str, Any]) -> None:
    call = make_call(**options)
    assert set(opcheck(OP.default, tuple(joint_of(call, letters_of(call)))).values()) == {"SUCCESS"}


@pytest.mark.parametrize("absent", [0, 1])
def test_opcheck_of_the_backward_op(absent: int) -> None:
    call = joint_of(make_call(frozen=frozenset(("gate", "input", "initial")), **FULL), "zfoi")
    call = call._replace(joint=call.joint.detach())
    output, final, kept = joint_linear_recurrence(*call)
    upstream: list[Tensor | None] = [torch.ones_like(output), torch.ones_like(final)]
    upstream[absent] = None
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for wanted in ([True, True], [False, True]):
        found = opcheck(BACKWARD.default, (*upstream, kept, *call, wanted), test_utils=tests)
        assert set(found.values()) == {"SUCCESS"}


def test_only_wanted_gradients_are_made() -> None:
    call = joint_of(make_call(), "zf")
    with torch.no_grad():
        output, final, kept = joint_linear_recurrence(*call)
        joint, initial = BACKWARD.default(output, final, kept, *call, [False, True])
    assert call.initial is not None
    assert (joint.numel(), initial.shape) == (0, call.initial.shape)


def test_vmap_runs_entry_after_entry() -> None:
    call = joint_of(make_call(3, 20, 2, initial=False, frozen=frozenset({"gate", "input"})), "zf")

    def one(joint: Tensor) -> Tensor:
        return joint_linear_recurrence(*call._replace(joint=joint)).output

    together = torch.vmap(one)(call.joint.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(together, joint_linear_recurrence(*call).output)


def test_differentiating_twice_is_refused() -> None:
    call = joint_of(make_call(), "zf")
    output = joint_linear_recurrence(*call).output
    (gradient,) = torch.autograd.grad(output.sum(), call.joint, create_graph=True)
    with pytest.raises(UnsupportedError, match="linear_recurrence was differentiated twice"):
        gradient.sum().backward()

"""The generated kernels against the reference, interpreted where there is no GPU, and compiled for one."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from structfly.lowering.linear_recurrence import recurrence_triton
from structfly.lowering.linear_recurrence.arguments import Arguments
from structfly.lowering.linear_recurrence.recurrence_triton import Shape
from tests.lowering.linear_recurrence.cases import (
    calls,
    joined,
    leaves_of,
    make_call,
    run_reference,
    upstream_for,
    with_leaves,
)
from tests.oracle import assert_like_eager

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Shape(steps=4, group=2, block=4, warps=1)
LENGTHS = (1, 3, 4, 5, 17, 29)
FULL: dict[str, Any] = {"weight": "gate", "output_gate": True, "sigmoid": True, "tanh": True}


class Kernels(torch.autograd.Function):
    """The lowering with the op's formula around it."""

    @staticmethod
    def forward(ctx: Any, call: Arguments, shape: Shape, *leaves: Any) -> tuple[Tensor, Tensor]:
        ctx.call, ctx.shape = with_leaves(call, [None if leaf is None else leaf.detach() for leaf in leaves]), shape
        made = recurrence_triton.forward(ctx.call, shape)
        ctx.save_for_backward(made.kept)
        return made.output, made.final

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        (kept,) = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[2:])
        output, final = upstream
        return None, None, *recurrence_triton.backward(ctx.call, kept, output, final, wanted, ctx.shape)


def run_kernels(call: Arguments, shape: Shape, *leaves: Any) -> Tensor:
    apply: Any = Kernels.apply
    return joined(*apply(call, shape, *leaves))


def check(call: Arguments, shape: Shape = SMALL) -> None:
    fast, reference = partial(run_kernels, call, shape), partial(run_reference, call)
    assert_like_eager(fast, reference, leaves_of(call), call.input.dtype, upstream_for(call))


@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(
    call=calls((torch.float32, torch.bfloat16, torch.float16), LENGTHS, device=DEVICE),
    shape=st.sampled_from((SMALL, Shape(8, 4, 2, 1), Shape(2, 1, 8, 1))),
)
def test_as_accurate_as_the_loop(call: Arguments, shape: Shape) -> None:
    check(call, shape)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [(), (5, 0, 22, 1, 0), (4, 8)])
@pytest.mark.parametrize("options", [{}, {**FULL, "reset": 0.1}])
def test_levels_of_chunks(options: dict[str, Any], lengths: tuple[int, ...], reverse: bool) -> None:
    check(make_call(2, 37, 3, lengths=lengths, reverse=reverse, device=DEVICE, **options), Shape(2, 1, 4, 1))


@pytest.mark.parametrize("lengths", [(), (0, 0)])
def test_without_steps_the_state_stays(lengths: tuple[int, ...]) -> None:
    call = make_call(2, 0, 3, lengths=lengths, device=DEVICE)
    made = recurrence_triton.forward(call, SMALL)
    assert call.initial is not None
    assert torch.equal(made.final, call.initial)
    upstream = torch.randn(2, 3, device=DEVICE)
    wanted = [True, True, False, False, True]
    initial = recurrence_triton.backward(call, made.kept, None, upstream, wanted, SMALL).initial
    assert initial is not None
    assert torch.equal(initial, upstream)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("of", ["input", "gate"])
def test_nothing_passes_a_reset(of: str, packed: bool, reverse: bool) -> None:
    call = make_call(1, 30, 2, reverse=reverse, initial=False, lengths=(14, 16) if packed else (), device=DEVICE)
    if not packed:
        reset = torch.zeros(1, 30, dtype=torch.bool, device=DEVICE)
        reset[0, 13 if reverse else 14] = True
        call = call._replace(reset=reset)
    earlier, later = (slice(14, 30), slice(0, 14)) if reverse else (slice(0, 14), slice(14, 30))
    made = recurrence_triton.forward(call, SMALL)
    poisoned = getattr(call, of).detach().clone()
    poisoned[:, earlier] = float("nan")
    output = recurrence_triton.forward(call._replace(**{of: poisoned}), SMALL).output
    assert output[:, later].isfinite().all()
    assert not output[:, earlier].isfinite().any()
    upstream = torch.zeros_like(made.output)
    upstream[:, later] = float("nan")
    gradients = recurrence_triton.backward(call, made.kept, upstream, None, [False, True, False, False, False], SMALL)
    assert gradients.input is not None
    assert gradients.input[:, earlier].eq(0).all()


@pytest.mark.parametrize("length", [3, 30])
def test_a_state_that_is_not_finite_does_not_pass_a_reset(length: int) -> None:
    reset = torch.zeros(1, length, dtype=torch.bool, device=DEVICE)
    reset[0, 1] = True
    call = make_call(1, length, 2, device=DEVICE)._replace(reset=reset)
    with torch.no_grad():
        assert call.initial is not None
        call.initial.fill_(float("nan"))
    made = recurrence_triton.forward(call, SMALL)
    assert made.output[:, 0].isnan().all()
    assert made.output[:, 1:].isfinite().all()
    assert made.final.isfinite().all()


def test_same_bits_every_time() -> None:
    call = make_call(2, 29, 5, device=DEVICE, **FULL)
    first, second = (run_kernels(call, SMALL, *leaves_of(call)) for _ in range(2))
    assert torch.equal(first, second)


def test_a_row_is_as_it_is_alone() -> None:
    call = make_call(3, 29, 5, device=DEVICE, initial=False)
    one = call._replace(gate=call.gate[1:2], input=call.input[1:2])
    whole, alone = (recurrence_triton.forward(each, SMALL).output for each in (call, one))
    assert torch.equal(whole[1:2], alone)


@pytest.mark.gpu
def test_steps_may_lie_more_than_2_to_the_31_elements_apart() -> None:
    length, width, apart = 9, 2, 2**29
    memory = torch.zeros((length - 1) * apart + width, dtype=torch.bfloat16, device="cuda")
    input = memory.as_strided((1, length, width), (0, apart, 1))
    input.copy_(torch.randn(1, length, width))
    call = make_call(1, length, width, device="cuda", dtype=torch.bfloat16)
    far, near = (recurrence_triton.forward(call._replace(input=each)) for each in (input, input.contiguous()))
    assert torch.equal(far.output, near.output)


def test_every_kernel_compiles_for_hopper() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.lowering.linear_recurrence.compile_kernels"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "compiled", done.stderr[-2000:]

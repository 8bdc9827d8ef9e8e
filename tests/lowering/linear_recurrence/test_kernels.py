"""The generated kernels against the reference, interpreted where there is no GPU, and compiled for one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from structfly.lowering.linear_recurrence import recurrence_triton
from structfly.lowering.linear_recurrence.arguments import Arguments
from structfly.lowering.linear_recurrence.reference import linear_recurrence_reference
from structfly.lowering.linear_recurrence.shapes import Shape, backward_shape, forward_shape
from tests.lowering.linear_recurrence.cases import (
    backward_by,
    calls,
    joined,
    joint_of,
    leaves_of,
    make_call,
    run_reference,
    upstream_for,
    with_leaves,
)
from tests.oracle import assert_like_eager, errors, in_float64, value_and_gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Shape(steps=2, rows=2, block=4, warps=1, group=2)
LENGTHS = (1, 3, 4, 5, 17, 29)
FULL: dict[str, Any] = {"weight": "gate", "output_gate": True, "sigmoid": True, "tanh": True}


class Kernels(torch.autograd.Function):
    """The lowering with the op's formula around it."""

    @staticmethod
    def forward(ctx: Any, call: Arguments, shape: Shape | None, *leaves: Any) -> tuple[Tensor, Tensor]:
        ctx.call, ctx.shape = with_leaves(call, [None if leaf is None else leaf.detach() for leaf in leaves]), shape
        made = recurrence_triton.forward(ctx.call, shape)
        ctx.save_for_backward(made.output if call.output_gate is None else made.kept)
        return made.output, made.final

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        (states,) = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[2:])
        output, final = upstream
        return None, None, *backward_by(recurrence_triton, ctx.call, states, output, final, wanted, ctx.shape)


def run_kernels(call: Arguments, shape: Shape | None, *leaves: Any) -> Tensor:
    apply: Any = Kernels.apply
    return joined(*apply(call, shape, *leaves))


def check(call: Arguments, shape: Shape = SMALL) -> None:
    fast, reference = partial(run_kernels, call, shape), partial(run_reference, call)
    assert_like_eager(fast, reference, leaves_of(call), call.input.dtype, upstream_for(call))


@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(
    call=calls((torch.float32, torch.bfloat16, torch.float16), LENGTHS, device=DEVICE),
    shape=st.sampled_from((SMALL, Shape(4, 1, 2, 1, 4), Shape(1, 4, 8, 1, 2, prefetch=False))),
)
def test_as_accurate_as_the_loop(call: Arguments, shape: Shape) -> None:
    check(call, shape)


@given(call=calls((torch.float32, torch.bfloat16), LENGTHS), width=st.integers(1, 64))
def test_a_warp_has_all_its_threads_in_one_step(call: Arguments, width: int) -> None:
    """So that steps are not shared out among threads; a thread has two channels."""
    call = call._replace(input=torch.empty(2, 1, width, dtype=call.input.dtype, device="meta"))
    for of in (forward_shape, backward_shape):
        shape = of(call)
        assert shape.rows * shape.fitted(width).block >= 64
        assert shape.chunk in (256, 512)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [(), (5, 0, 22, 1, 0), (4, 8)])
@pytest.mark.parametrize("options", [{}, {**FULL, "reset": 0.1}])
def test_groups_of_chunks(options: dict[str, Any], lengths: tuple[int, ...], reverse: bool) -> None:
    check(make_call(2, 37, 3, lengths=lengths, reverse=reverse, device=DEVICE, **options), Shape(1, 2, 4, 1, 2))


@pytest.mark.parametrize("options", [{"weight": "complement"}, FULL])
def test_gradients_are_written_into_slices_of_one_tensor(options: dict[str, Any]) -> None:
    call = make_call(2, 29, 5, device=DEVICE, **options)
    joint = joint_of(call, "zfoi" if call.input_gate is not None else "fz")
    separate = joint.separate
    made = recurrence_triton.forward(separate, SMALL)
    states = made.output if separate.output_gate is None else made.kept
    upstream = torch.randn_like(made.output)
    alone = backward_by(recurrence_triton, separate, states, upstream, None, [True] * 5, SMALL)
    together = torch.full_like(joint.joint, float("nan"))
    into = joint.gradients((together, None))
    recurrence_triton.backward(separate, states, upstream, None, into, SMALL)
    for one, other in zip(into[:4], alone[:4], strict=True):
        assert torch.equal(one, other) if one is not None and other is not None else one is other
    assert together.isfinite().all()


@pytest.mark.parametrize("lengths", [(), (0, 0)])
def test_without_steps_the_state_stays(lengths: tuple[int, ...]) -> None:
    call = make_call(2, 0, 3, lengths=lengths, device=DEVICE)
    made = recurrence_triton.forward(call, SMALL)
    assert call.initial is not None
    assert torch.equal(made.final, call.initial)
    upstream = torch.randn(2, 3, device=DEVICE)
    wanted = [True, True, False, False, True]
    initial = backward_by(recurrence_triton, call, made.output, None, upstream, wanted, SMALL).initial
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
    gradients = backward_by(
        recurrence_triton, call, made.output, upstream, None, [False, True, False, False, False], SMALL
    )
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


@pytest.mark.parametrize("gates", ["any", "slow", "ends"])
@pytest.mark.parametrize("options", [{}, {"reset": 0.01, "reverse": True}])
def test_more_accurate_than_the_loop_by_what_roundings_lose(options: dict[str, Any], gates: str) -> None:
    call = make_call(1, 800, 8, gates=gates, device=DEVICE, **options)
    with torch.no_grad():
        mine = run_kernels(call, Shape(8, 4, 8, 1), *leaves_of(call))
        loop = run_reference(call, *leaves_of(call))
        exact = run_reference(call, *map(in_float64, leaves_of(call)))
    assert errors(mine, exact)[0] <= 0.9 * errors(loop, exact)[0]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, which interprets
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_states_that_leave_the_range_are_infinite() -> None:
    call = make_call(1, 20, 2, device=DEVICE, initial=False)
    input = torch.zeros_like(call.input)
    input[0, 3], input[0, 6] = 3e38, torch.tensor([3e38, -3e38])
    reset = torch.zeros(1, 20, dtype=torch.bool, device=DEVICE)
    reset[0, 9] = True
    call = call._replace(gate=torch.ones_like(input), input=input, reset=reset)
    assert torch.equal(recurrence_triton.forward(call, SMALL).output, linear_recurrence_reference(*call[:-1])[0])


def test_same_bits_every_time() -> None:
    call = make_call(2, 29, 5, device=DEVICE, **FULL)
    first, second = (run_kernels(call, SMALL, *leaves_of(call)) for _ in range(2))
    assert torch.equal(first, second)


def test_a_call_like_one_before_is_not_prepared_again() -> None:
    call = make_call(2, 29, 5, device=DEVICE, seed=1)
    recurrence_triton.forward(call, SMALL)
    known = recurrence_triton._launch_of.cache_info()
    recurrence_triton.forward(make_call(2, 29, 5, device=DEVICE, seed=2), SMALL)
    again = recurrence_triton._launch_of.cache_info()
    assert (again.hits, again.misses) == (known.hits + 1, known.misses)
    turned = make_call(2, 29, 5, device=DEVICE, layout="BDT")
    check(turned)
    assert recurrence_triton._launch_of.cache_info().misses > again.misses


def test_a_row_is_as_it_is_alone() -> None:
    call = make_call(3, 29, 5, device=DEVICE, initial=False)
    one = call._replace(gate=call.gate[1:2], input=call.input[1:2])
    whole, alone = (recurrence_triton.forward(each, SMALL).output for each in (call, one))
    assert torch.equal(whole[1:2], alone)


@pytest.mark.parametrize("shape", [SMALL, Shape(4, 4, 4, 1)])
def test_steps_may_lie_more_than_2_to_the_31_elements_apart(shape: Shape) -> None:
    length, width, apart = 9, 2, 2**29
    memory = torch.empty((length - 1) * apart + width, dtype=torch.bfloat16, device=DEVICE)  # few pages of it are used
    input = memory.as_strided((1, length, width), (0, apart, 1))
    input.copy_(torch.randn(1, length, width))
    call = make_call(1, length, width, device=DEVICE, dtype=torch.bfloat16, weight="complement")
    made = []
    for each in (input, input.contiguous()):
        called = call._replace(input=each)
        output = recurrence_triton.forward(called, shape).output
        wanted = [True, False, False, False, False]
        made.append((output, backward_by(recurrence_triton, called, output, output, None, wanted, shape).gate))
    (far, far_gradient), (near, near_gradient) = made
    assert torch.equal(far, near)
    assert far_gradient is not None
    assert near_gradient is not None
    assert torch.equal(far_gradient, near_gradient)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [(), (61,), (7, 40, 14)])
def test_chunks_are_combined_in_their_order(lengths: tuple[int, ...], reverse: bool) -> None:
    """Of gates that are -1, 0 or 1 and inputs that are integers, every order but the right one shows."""
    call = make_call(2, 61, 3, lengths=lengths, reverse=reverse, device=DEVICE)
    generator = torch.Generator().manual_seed(0)
    gate = torch.randint(-8, 9, call.gate.shape, generator=generator).sign().float().to(DEVICE)
    whole = call._replace(gate=gate, input=call.input.detach().mul(9).round(), initial=None)
    exact = linear_recurrence_reference(*whole[:-1])
    for group in (1, 2, 32):
        made = recurrence_triton.forward(whole, Shape(1, 2, 4, 1, group))
        assert torch.equal(made.output, exact[0])
        assert torch.equal(made.final, exact[1])


@pytest.fixture
def patience() -> Iterator[None]:
    """A wait that never ends is an error."""

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("patience")
def test_no_value_is_taken_for_a_word_that_is_not_there() -> None:
    call = make_call(1, 20, 3, device=DEVICE)
    bits = torch.full((1, 20, 3), -1, dtype=torch.int32, device=DEVICE).view(torch.float32)
    made = recurrence_triton.forward(call._replace(gate=bits, input=bits, initial=None), SMALL)
    assert made.output.isnan().all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, which interprets
@pytest.mark.parametrize("reset", [False, True])
def test_a_product_of_gates_that_is_minus_0_is_no_reset(reset: bool) -> None:
    call = make_call(1, 20, 2, device=DEVICE)
    gate = torch.full_like(call.gate, -1.0)
    gate[0, 9] = 0.0  # in the first chunk of a group, of whose word the second one's states are made
    resets = torch.zeros(1, 20, dtype=torch.bool, device=DEVICE)
    resets[0, 10] = reset
    call = call._replace(gate=gate, initial=torch.full((1, 2), float("inf"), device=DEVICE), reset=resets)
    made = recurrence_triton.forward(call, Shape(4, 1, 2, 1, 2))  # in a sum of rows -0 would become 0
    expected, final = linear_recurrence_reference(*call[:-1])
    torch.testing.assert_close(made.output, expected, equal_nan=True)
    torch.testing.assert_close(made.final, final, equal_nan=True)
    assert made.final.isfinite().all() == reset


def test_the_final_state_is_the_last_output() -> None:
    for length in (3, 4, 29):
        call = make_call(2, length, 3, gates="slow", device=DEVICE)
        made = recurrence_triton.forward(call, Shape(1, 4, 4, 1))
        assert torch.equal(made.final, made.output[:, -1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(1, 2**18, 96), (8, 2048, 1024), (3, 70001, 5)])
def test_same_bits_every_time_where_programs_wait_for_each_other(
    sizes: tuple[int, int, int], dtype: torch.dtype
) -> None:
    call = make_call(*sizes, dtype=dtype, gates="slow", device="cuda")
    upstream = torch.randn_like(call.input)
    first: list[Tensor | None] = []
    for _ in range(10):
        made = recurrence_triton.forward(call)
        wanted = [True, True, False, False, True]
        found = backward_by(recurrence_triton, call, made.output, upstream, made.final, wanted)
        all_made = [made.output, made.final, found.gate, found.input, found.initial]
        first = first or all_made
        for one, other in zip(first, all_made, strict=True):
            assert one is not None
            assert other is not None
            assert torch.equal(one, other)


@pytest.mark.gpu
def test_sigmoids_are_right_to_the_last_places() -> None:
    """The complement's, by value, and next to 1 also the gate's on average: a loop adds its errors up."""
    most = 2.25 * 2**-22  # 2^-22 of ex2.approx, 2^-23 of rcp.approx, and three roundings
    y = torch.linspace(-87, 87, 100_001, device="cuda").view(1, 1, -1)
    call = make_call(1, 1, y.shape[2], weight="complement", sigmoid=True, device="cuda")
    call = call._replace(gate=y, input=torch.ones_like(y), initial=torch.zeros(1, y.shape[2], device="cuda"))
    exact = torch.sigmoid(-y.double())
    complement = recurrence_triton.forward(call).output
    assert ((complement - exact) / exact).abs().max() <= most
    gate = recurrence_triton.forward(call._replace(input=torch.zeros_like(y), initial=torch.ones_like(y[0]))).output
    exact = torch.sigmoid(y.double())
    assert ((gate - exact) / exact).abs().max() <= most
    slow = (y > 6.9) & (y < 12)
    assert (gate - exact)[slow].mean().abs() <= 2**-29


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_activations_of_16_bits_are_off_by_less_than_their_rounding(dtype: torch.dtype) -> None:
    """The states' tanh in float32, before any rounding, and what an output gate lets through, rounded once."""
    y = torch.arange(-(2**15), 2**15, device="cuda").to(torch.int16).view(dtype)
    y = y[y.isfinite()].view(1, 1, -1)
    shut, one = torch.full_like(y, -100.0), torch.ones_like(y)
    call = make_call(1, 1, y.shape[2], dtype=dtype, weight="complement", sigmoid=True, initial=False, device="cuda")
    rounding = torch.finfo(dtype).eps / 2
    made = recurrence_triton.forward(call._replace(gate=shut, input=y, tanh=True)).final.double()
    exact = y[0].double().tanh()
    assert ((made - exact).abs() <= rounding / 2 * exact.abs() + 2**-126).all()
    made = recurrence_triton.forward(call._replace(gate=shut, input=one, output_gate=y)).output.double()
    exact = torch.sigmoid(y.double())
    least = max(2**-125, torch.finfo(dtype).smallest_normal * rounding)  # exp(-87), or the last place of small numbers
    assert ((made - exact).abs() <= (rounding + 2**-20) * exact + least).all()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [Shape(4, 64, 8, 8, group=32), Shape(4, 16, 2, 1), Shape(2, 8, 4, 2, group=4)])
def test_threads_that_read_the_same_words(shape: Shape) -> None:
    """A chunk's words are fewer than its threads, so that some words are read by several, at times of their own."""
    call = make_call(1, 20000, 64, gates="slow", device="cuda")
    expected = recurrence_triton.forward(call)
    for _ in range(50):
        made = recurrence_triton.forward(call, shape)
        for found, other in ((made.output, expected.output), (made.final, expected.final)):
            assert errors(found, other.double())[0] <= 16 * torch.finfo(torch.float32).eps


@pytest.mark.gpu
@pytest.mark.parametrize("gates", ["any", "slow", "ends"])
@pytest.mark.parametrize("options", [{}, {"weight": "complement", "sigmoid": True}, FULL])
def test_no_less_accurate_than_the_loop_over_many_groups(options: dict[str, Any], gates: str) -> None:
    call = make_call(1, 20000, 64, gates=gates, device="cuda", **options)
    leaves, upstream = leaves_of(call), upstream_for(call)
    mine = value_and_gradients(partial(run_kernels, call, None), leaves, upstream)
    loop = value_and_gradients(partial(run_reference, call), leaves, upstream)
    exact = value_and_gradients(partial(run_reference, call), list(map(in_float64, leaves)), upstream.double())
    for found, theirs, true in zip(*((value, *gradients) for value, gradients in (mine, loop, exact)), strict=True):
        assert found is not None
        assert theirs is not None
        assert true is not None
        assert errors(found, true)[0] <= 1.1 * errors(theirs, true)[0] + torch.finfo(torch.float32).eps


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_takes_little_memory_beside_its_gradients(dtype: torch.dtype) -> None:
    call = make_call(1, 2**18, 256, dtype=dtype, initial=False, device="cuda")
    made = recurrence_triton.forward(call)
    upstream = torch.randn_like(made.output)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    backward_by(recurrence_triton, call, made.output, upstream, None, [True, True, False, False, False])
    size = made.output.numel() * made.output.element_size()
    assert torch.cuda.max_memory_allocated() - before <= (2 + 1 / 32) * size


def test_every_kernel_compiles_for_hopper() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.lowering.linear_recurrence.compile_kernels"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "compiled", done.stderr[-2000:]

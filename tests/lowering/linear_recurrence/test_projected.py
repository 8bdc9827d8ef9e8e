"""The recurrence that makes its gates against a product and the reference, interpreted where there is no GPU, and
compiled for one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from structfly.errors import ArgumentError, UnsupportedError
from structfly.lowering.linear_recurrence.arguments import JointArguments
from structfly.lowering.linear_recurrence.projected import CUTS, Cut, projected_recurrence
from tests.lowering.block_products.test_products import DEVICE, DTYPES, roundings
from tests.lowering.linear_recurrence.cases import joined, specified
from tests.oracle import assert_like_eager, in_float64

SMALL = Cut(steps=4, rows=4, block=16, inner=16, warps=1, stages=2, group=2)
ORDERS = ("zf", "zfo", "zfoi", "ofz")


class Variant(NamedTuple):
    """What a call may have, or be of, whatever its sizes."""

    order: str
    dtype: torch.dtype
    reverse: bool
    bias: bool
    begun: bool


VARIANTS = st.builds(
    Variant,
    order=st.sampled_from(ORDERS),
    dtype=st.sampled_from(DTYPES),
    reverse=st.booleans(),
    bias=st.booleans(),
    begun=st.booleans(),
)


class Given(NamedTuple):
    """Tensors of a call, in its order."""

    inputs: Tensor
    weight: Tensor
    bias: Tensor | None
    initial: Tensor | None


def drawn(
    batch: int, length: int, inner: int, width: int, order: str, dtype: torch.dtype, *, bias: bool, begun: bool
) -> Given:
    generator = torch.Generator().manual_seed(length)
    made = partial(torch.randn, generator=generator)
    inputs, weight = made(batch, length, inner), made(len(order) * width, inner) / inner**0.5
    return Given(
        inputs.to(DEVICE, dtype),
        weight.to(DEVICE, dtype),
        made(len(order) * width).to(DEVICE, dtype) if bias else None,
        made(batch, width).to(DEVICE) if begun else None,
    )


Function = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


def by_kernel(order: str, cut: Cut, *, reverse: bool) -> Function:
    def run(inputs: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None) -> Tensor:
        output = inputs.new_empty(*inputs.shape[:2], weight.shape[0] // len(order))
        final = projected_recurrence(inputs, weight, bias, order, initial, output, reverse=reverse, cut=cut)
        return joined(output, final)

    return run


def by_loop(order: str, *, reverse: bool) -> Function:
    def run(inputs: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None) -> Tensor:
        joint = functional.linear(inputs, weight, bias)
        call = JointArguments(joint, order, initial, None, None, "i" not in order, True, True, reverse, False)
        return specified(call.separate)

    return run


@settings(max_examples=25)
@given(
    batch=st.integers(0, 2),
    rows=st.sampled_from((0, 1, 3, 4, 5, 8, 13, 21)),
    inner=st.sampled_from((8, 16, 40)),
    width=st.sampled_from((8, 16, 24)),
    variant=VARIANTS,
)
def test_as_accurate_as_a_product_and_the_loop(batch: int, rows: int, inner: int, width: int, variant: Variant) -> None:
    order, dtype, reverse, bias, begun = variant
    given = drawn(batch, rows * SMALL.steps, inner, width, order, dtype, bias=bias, begun=begun)
    mine, theirs = by_kernel(order, SMALL, reverse=reverse), by_loop(order, reverse=reverse)
    assert_like_eager(mine, theirs, given, dtype, roundings=roundings(dtype))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("group", [1, 2, 32])
def test_states_pass_through_chunks_in_their_order(group: int, reverse: bool) -> None:
    """Gates next to 1, of which many chunks' are seen in a state."""
    inputs, weight, _, initial = drawn(2, 84, 16, 8, "zf", torch.float32, bias=False, begun=True)
    bias = torch.cat([torch.zeros(8), torch.full((8,), 5.0)]).to(DEVICE)
    mine = by_kernel("zf", SMALL._replace(group=group), reverse=reverse)
    given = (inputs, weight, bias, initial)
    assert_like_eager(mine, by_loop("zf", reverse=reverse), given, roundings=roundings(torch.float32))


def test_inputs_may_overlap_and_output_be_a_part() -> None:
    _, weight, bias, _ = drawn(1, 4, 16, 8, "zfo", torch.float32, bias=True, begun=False)
    overlapping = torch.randn(2, 21, 8).to(DEVICE).as_strided((2, 20, 16), (21 * 8, 8, 1))
    whole = torch.full((2, 30, 24), 7.0, device=DEVICE)
    final = projected_recurrence(overlapping, weight, bias, "zfo", None, whole[:, 5:25, 8:16], reverse=False, cut=SMALL)
    expected = by_kernel("zfo", SMALL, reverse=False)(overlapping.contiguous(), weight, bias, None)
    assert torch.equal(joined(whole[:, 5:25, 8:16], final), expected)
    whole[:, 5:25, 8:16] = 7.0
    assert whole.eq(7.0).all()


@pytest.mark.parametrize(
    ("length", "width", "dtype", "error", "why"),
    [
        (4, 5, torch.bfloat16, UnsupportedError, "multiples of 16 bytes"),
        (7, 8, torch.float32, ArgumentError, "7 steps; allowed: multiples of 4"),
    ],
)
def test_what_the_kernel_does_not_take_is_refused(
    length: int, width: int, dtype: torch.dtype, error: type[Exception], why: str
) -> None:
    inputs, weight, *_ = drawn(1, length, 16, width, "zf", dtype, bias=False, begun=False)
    with pytest.raises(error, match=why):
        projected_recurrence(
            inputs, weight, None, "zf", None, inputs.new_empty(1, length, width), reverse=False, cut=SMALL
        )


@pytest.mark.gpu
@pytest.mark.parametrize("order", CUTS)
@pytest.mark.parametrize("reverse", [False, True])
def test_same_bits_every_time_where_programs_wait_for_each_other(order: str, reverse: bool) -> None:
    cut = CUTS[order]
    given = drawn(2, 2**14 + cut.steps, 256, 136, order, torch.bfloat16, bias=True, begun=True)
    mine = by_kernel(order, cut, reverse=reverse)
    first = mine(*given)
    for _ in range(10):
        assert torch.equal(mine(*given), first)
    exact = by_loop(order, reverse=reverse)(*map(in_float64, given))
    assert (first.double() - exact).norm() <= 2**-8 * exact.norm()


def test_every_kernel_compiles_for_hopper() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.lowering.linear_recurrence.compile_projected"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "compiled", done.stderr[-2000:]

"""Projection and pooling in one, against a loop over time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from structfly.errors import UnsupportedError
from structfly.nn import QRNN, QRNNState
from structfly.nn.window_recurrence import why_in_two, window_recurrence
from structfly.nn.windows import windows
from tests.lowering.block_products.test_products import DEVICE, roundings
from tests.lowering.linear_recurrence.cases import joined
from tests.lowering.linear_recurrence.test_projected import SMALL, VARIANTS, Variant, by_loop
from tests.oracle import assert_like_eager
from tests.precision import matmul_precision


@settings(max_examples=20)
@given(
    batch=st.integers(0, 2),
    length=st.sampled_from((0, 1, 2, 3, 4, 7, 16, 17, 31, 64, 65)),
    reach=st.integers(0, 3),
    width=st.sampled_from((8, 24)),
    units=st.sampled_from((8, 24)),
    variant=VARIANTS,
)
def test_as_accurate_as_layer_by_layer(
    batch: int, length: int, reach: int, width: int, units: int, variant: Variant
) -> None:
    order, dtype, reverse, bias, begun = variant
    generator = torch.Generator().manual_seed(length)

    def drawn(*sizes: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(sizes, generator=generator).to(DEVICE, to)

    out, inner = len(order) * units, (reach + 1) * width
    input, beside, weight = drawn(batch, length, width), drawn(batch, reach, width), drawn(out, inner) / inner**0.5
    cell = drawn(batch, units, to=torch.float32) if begun else None
    given = [input, beside, weight, drawn(out) if bias else None, cell]

    def mine(input: Tensor, beside: Tensor, weight: Tensor, bias: Tensor | None, cell: Tensor | None) -> Tensor:
        return joined(*window_recurrence(input, beside, weight, bias, order, cell, reverse=reverse, cut=SMALL))

    def theirs(input: Tensor, beside: Tensor, weight: Tensor, bias: Tensor | None, cell: Tensor | None) -> Tensor:
        seen = windows(input, beside, reverse=reverse)
        return by_loop(order, reverse=reverse)(seen, weight, bias, cell)

    assert_like_eager(mine, theirs, given, dtype, roundings=roundings(dtype))


def test_a_gradient_is_refused() -> None:
    input, beside, weight = torch.randn(1, 9, 8), torch.randn(1, 1, 8), torch.randn(16, 16, requires_grad=True)
    with pytest.raises(UnsupportedError, match="no_grad"):
        window_recurrence(input, beside, weight, None, "zf", None, reverse=False, cut=SMALL)
    with torch.no_grad():
        output, final = window_recurrence(input, beside, weight, None, "zf", None, reverse=False, cut=SMALL)
    assert torch.equal(output[:, -1], final)


@pytest.mark.gpu
@pytest.mark.parametrize("pooling", ["f", "fo"])
@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize(("length", "dtype"), [(131, torch.float16), (4096, torch.bfloat16), (5003, torch.float32)])
def test_a_layer_without_gradients_writes_nothing_between(
    pooling: str, window: int, length: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(length)
    layer = QRNN(64, 72, pooling=pooling, window=window, bidirectional=True, device="cuda", dtype=dtype)
    given = torch.randn(2, 2 * length, 64, device="cuda", dtype=dtype)
    with torch.no_grad(), matmul_precision("tf32"):
        _, state = layer(given[:, :length])
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output, final = layer(given[:, length:].contiguous(), state)
        assert torch.cuda.max_memory_allocated() - before <= 3.2 * output.numel() * output.element_size() + 2**20
        layer.double()
        doubled = QRNNState(state.cell.double(), state.window.double())
        expected, final_expected = layer(given[:, length:].double(), doubled)
    assert (output - expected).norm() <= 2**-8 * expected.norm()
    assert (final.cell - final_expected.cell).norm() <= 2**-8 * final_expected.cell.norm()


def test_a_layer_says_why_it_takes_two_kernels() -> None:
    projection, input, beside = nn.Linear(16, 24), torch.randn(1, 300, 8), torch.randn(1, 1, 8)
    assert "gradient" in why_in_two(projection, input, beside, "zfo", None)
    projection.requires_grad_(False)
    narrow = projection.bfloat16(), input.bfloat16(), beside.bfloat16()
    assert "float32" in why_in_two(*narrow, "zfo", torch.zeros(1, 8).bfloat16())
    assert "zf, zfo" in why_in_two(*narrow, "zfoi", None)
    assert "99 steps" in why_in_two(narrow[0], narrow[1][:, :100], narrow[2], "zfo", None)
    assert "on cpu" in why_in_two(*narrow, "zfo", None)
    with FlopCounterMode(display=False):
        assert "modes" in why_in_two(*narrow, "zfo", None)

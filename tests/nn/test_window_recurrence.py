"""Layers whose projection and pooling are one kernel, and why they are two."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from structfly.nn import QRNN, QRNNState
from structfly.nn.window_recurrence import why_in_two
from tests.precision import matmul_precision


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

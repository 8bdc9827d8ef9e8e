"""Windows over time against slices of the joined steps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from structfly.nn.windows import windows


def joined(input: Tensor, beside: Tensor, *, reverse: bool) -> Tensor:
    seen = torch.cat([input, beside] if reverse else [beside, input], 1)
    return torch.cat([seen[:, first : first + input.shape[1]] for first in range(beside.shape[1] + 1)], -1)


@given(
    batch=st.integers(1, 3),
    length=st.integers(0, 9),
    width=st.integers(1, 5),
    reach=st.integers(0, 6),
    reverse=st.booleans(),
    turned=st.booleans(),
)
def test_windows_and_their_gradients(
    batch: int, length: int, width: int, reach: int, reverse: bool, turned: bool
) -> None:
    shape = (length, batch, width) if turned else (batch, length, width)
    input = torch.randn(shape, dtype=torch.float64)
    input = (input.transpose(0, 1) if turned else input).requires_grad_()
    beside = torch.randn(batch, reach, width, dtype=torch.float64, requires_grad=True)
    made, expected = (function(input, beside, reverse=reverse) for function in (windows, joined))
    assert torch.equal(made, expected)
    upstream = torch.randn_like(expected)
    gradients = (torch.autograd.grad(each, [input, beside], upstream, allow_unused=True) for each in (made, expected))
    for mine, theirs in zip(*gradients, strict=True):
        if mine is None or theirs is None:
            assert not reach
        else:
            torch.testing.assert_close(mine, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [4, 6, 256])
@pytest.mark.parametrize("first", [0, 1])
def test_words_of_eight_bytes(width: int, first: int) -> None:
    wide = torch.randn(2, 33, width + 4, device="cuda", dtype=torch.bfloat16)
    input, beside = wide[:, :, first : first + width], wide[:, :2, first : first + width]
    for reverse in (False, True):
        assert torch.equal(windows(input, beside, reverse=reverse), joined(input, beside, reverse=reverse))

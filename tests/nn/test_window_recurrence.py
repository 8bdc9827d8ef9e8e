"""Projection and pooling in one, against a loop over time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from structfly.errors import UnsupportedError
from structfly.lowering.linear_recurrence.arguments import JointArguments
from structfly.lowering.linear_recurrence.reference import linear_recurrence_reference
from structfly.nn.window_recurrence import window_recurrence
from structfly.nn.windows import windows
from tests.lowering.block_products.test_products import DEVICE, DTYPES, roundings
from tests.lowering.linear_recurrence.cases import joined
from tests.lowering.linear_recurrence.test_projected import ORDERS, SMALL
from tests.oracle import assert_like_eager


@settings(max_examples=20)
@given(
    batch=st.integers(0, 2),
    length=st.sampled_from((0, 1, 2, 3, 4, 7, 16, 17, 31, 64, 65)),
    reach=st.integers(0, 3),
    width=st.sampled_from((8, 24)),
    units=st.sampled_from((8, 24)),
    order=st.sampled_from(ORDERS),
    dtype=st.sampled_from(DTYPES),
    reverse=st.booleans(),
    bias=st.booleans(),
    begun=st.booleans(),
)
def test_as_accurate_as_layer_by_layer(
    batch: int,
    length: int,
    reach: int,
    width: int,
    units: int,
    order: str,
    dtype: torch.dtype,
    reverse: bool,
    bias: bool,
    begun: bool,
) -> None:
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
        made = functional.linear(windows(input, beside, reverse=reverse), weight, bias)
        call = JointArguments(made, order, cell, None, None, "i" not in order, True, True, reverse, False)
        return joined(*linear_recurrence_reference(*call.separate[:-1]))

    assert_like_eager(mine, theirs, given, dtype, roundings=roundings(dtype))


def test_a_gradient_is_refused() -> None:
    input, beside, weight = torch.randn(1, 9, 8), torch.randn(1, 1, 8), torch.randn(16, 16, requires_grad=True)
    with pytest.raises(UnsupportedError, match="no_grad"):
        window_recurrence(input, beside, weight, None, "zf", None, reverse=False)
    with torch.no_grad():
        output, final = window_recurrence(input, beside, weight, None, "zf", None, reverse=False)
    assert torch.equal(output[:, -1], final)

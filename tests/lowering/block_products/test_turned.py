"""Features of two axes in the other order, against torch's copy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structfly.lowering.block_products.turned import turned
from tests.lowering.block_products.test_products import DEVICE


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(0, 40),
    a=st.integers(1, 150),
    b=st.sampled_from((1, 2, 3, 16, 64, 65, 130)),
    dtype=st.sampled_from((torch.bfloat16, torch.float16, torch.float32)),
)
def test_all_of_it_is_where_it_belongs(rows: int, a: int, b: int, dtype: torch.dtype) -> None:
    features = torch.arange(rows * a * b, device=DEVICE).remainder(251).to(dtype).view(rows, a, b)
    made = turned(features)
    assert made.is_contiguous()
    assert torch.equal(made, features.mT)


@pytest.mark.gpu
def test_more_than_2_to_the_31_numbers() -> None:
    features = torch.zeros(2**17 + 3, 4, 2**12, device="cuda", dtype=torch.bfloat16)
    features[-1] = torch.arange(2**14, device="cuda").view(4, -1).bfloat16()
    assert torch.equal(turned(features)[-1], features[-1].mT)

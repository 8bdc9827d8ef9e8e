"""The op of BLAST weights against its specification."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structfly.lowering.blast.op import BLAST
from structfly.lowering.blast.reference import blast_reference
from tests.oracle import assert_like_eager


@settings(max_examples=30, deadline=None)
@given(
    in_features=st.integers(5, 30),
    out_features=st.integers(5, 30),
    row_blocks=st.integers(1, 3),
    column_blocks=st.integers(1, 3),
    rank=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    rematerialise=st.booleans(),
)
def test_op_is_its_reference(
    in_features: int,
    out_features: int,
    row_blocks: int,
    column_blocks: int,
    rank: int,
    dtype: torch.dtype,
    rematerialise: bool,
) -> None:
    torch.manual_seed(0)
    shapes = [
        (2, 3, in_features),
        (column_blocks, rank, -(-in_features // column_blocks)),
        (rank, row_blocks, column_blocks),
        (row_blocks, -(-out_features // row_blocks), rank),
        (out_features,),
    ]
    arguments = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]

    def op(x: Tensor, right: Tensor, scale: Tensor, left: Tensor, bias: Tensor) -> Tensor:
        return BLAST(x, [right, scale, left], bias, [out_features], rematerialise=rematerialise)

    def reference(x: Tensor, right: Tensor, scale: Tensor, left: Tensor, bias: Tensor) -> Tensor:
        return blast_reference(x, right, scale, left, bias, out_features)

    assert_like_eager(op, reference, arguments, dtype, upstream=torch.randn(2, 3, out_features, dtype=dtype))


@pytest.mark.parametrize("frozen", range(4))
def test_only_the_gradients_asked_for_are_made(frozen: int) -> None:
    shapes = [(4, 6), (2, 3, 3), (3, 2, 2), (2, 4, 3)]
    arguments = [torch.randn(shape, requires_grad=index != frozen) for index, shape in enumerate(shapes)]
    BLAST(arguments[0], arguments[1:], None, [8]).sum().backward()
    assert [argument.grad is None for argument in arguments] == [index == frozen for index in range(4)]

"""A block-sparse weight and one of low rank in one op: against the reference, by torch and generated."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structfly.lowering.block_sparse import generated
from structfly.lowering.block_sparse.layout import BlockLayout, Grid
from structfly.lowering.block_sparse_low_rank.op import BLOCK_SPARSE_LOW_RANK
from structfly.lowering.block_sparse_low_rank.reference import block_sparse_low_rank_reference
from tests.lowering.test_block_sparse import kept_blocks
from tests.oracle import assert_as_accurate, assert_like_eager

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("by_torch", [True, False])
@settings(max_examples=20, deadline=None)
@given(
    kept=kept_blocks(),
    eights=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    beyond=st.sampled_from([(0, 0), (3, 0), (0, 5), (3, 5)]),
    tokens=st.integers(0, 20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_products_are_the_references(
    by_torch: bool,
    kept: Tensor,
    eights: tuple[int, int, int],
    beyond: tuple[int, int],
    tokens: int,
    dtype: torch.dtype,
) -> None:
    block_out, block_in, rank = (8 * each for each in eights)
    grid = Grid(kept.shape[0], kept.shape[1], block_out, block_in)
    in_features, out_features = grid.columns * block_in - beyond[0], grid.rows * block_out - beyond[1]
    layout = BlockLayout.of(kept.to(DEVICE), equal_rows=False)
    index = [each for each in layout if each is not None]
    generator = torch.Generator().manual_seed(0)
    shapes = ((tokens, in_features), (int(kept.sum()), block_out, block_in), (rank, in_features), (out_features, rank))
    arguments = [torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_() for shape in shapes]
    upstream = torch.randn(tokens, out_features, generator=generator).to(DEVICE)

    def fast(x: Tensor, values: Tensor, right: Tensor, left: Tensor) -> Tensor:
        return BLOCK_SPARSE_LOW_RANK(x, [values, right, left, *index], None, [out_features, grid.columns])

    def slow(x: Tensor, values: Tensor, right: Tensor, left: Tensor) -> Tensor:
        return block_sparse_low_rank_reference(
            x, values, right, left, *layout, out_features=out_features, block_columns=grid.columns
        )

    with pytest.MonkeyPatch.context() as patch:
        # Interpreted, the generated products have tiles of their own; on a GPU both run as they are.
        patch.setattr(generated, "why_not", lambda *_: "asked" if by_torch else "")
        assert_like_eager(fast, slow, arguments, dtype, upstream, roundings=16)


@pytest.mark.parametrize("learned", [each for each in itertools.product((False, True), repeat=4) if any(each)])
def test_gradients_are_those_of_what_is_learned(learned: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generated, "why_not", lambda *_: "")
    layout = BlockLayout.of(torch.tensor([[True, False], [True, True]], device=DEVICE), equal_rows=False)
    index = [each for each in layout if each is not None]
    generator = torch.Generator().manual_seed(0)
    sides = ((20, 15), (3, 16, 8), (8, 15), (30, 8))
    arguments = [torch.randn(each, generator=generator).to(DEVICE, torch.bfloat16) for each in sides]
    upstream = torch.randn(20, 30, generator=generator).to(DEVICE, torch.bfloat16)

    def gradients(wide: torch.dtype | None) -> tuple[Tensor, ...]:
        dtype = wide or torch.bfloat16
        taken = [
            each.to(dtype).detach().requires_grad_(learns) for each, learns in zip(arguments, learned, strict=True)
        ]
        x, values, right, left = taken
        if wide is None:
            y = BLOCK_SPARSE_LOW_RANK(x, [values, right, left, *index], None, [30, 2])
        else:
            y = block_sparse_low_rank_reference(x, values, right, left, *layout, out_features=30, block_columns=2)
        return torch.autograd.grad(y, [each for each in taken if each.requires_grad], upstream.to(dtype))

    for mine, single, exact in zip(*map(gradients, (None, torch.float32, torch.float64)), strict=True):
        assert_as_accurate(mine, single.to(mine.dtype), exact, mine.dtype, "gradient", roundings=16)

"""Generated block-sparse products, interpreted on a CPU: against the reference, with any blocks kept."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structfly.lowering.block_sparse import generated, listing
from structfly.lowering.block_sparse.layout import BlockLayout, Grid
from structfly.lowering.block_sparse.reference import block_sparse_reference
from tests.lowering.block_products.test_products import DEVICE, DTYPES, roundings
from tests.lowering.test_block_sparse import kept_blocks
from tests.oracle import assert_as_accurate


@settings(max_examples=30, deadline=None)
@given(
    kept=kept_blocks(),
    eights=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    tokens=st.integers(0, 40),
    dtype=st.sampled_from(DTYPES),
)
def test_products_are_the_references(kept: Tensor, eights: tuple[int, int], tokens: int, dtype: torch.dtype) -> None:
    grid = Grid(kept.shape[0], kept.shape[1], *(8 * each for each in eights))
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    x, values = random(tokens, grid.columns * grid.block_in), random(int(kept.sum()), grid.block_out, grid.block_in)
    grad = random(tokens, grid.rows * grid.block_out)
    equal = bool((kept.sum(1) == kept[0].sum()).all())
    for equal_rows in {False, equal}:
        layout = BlockLayout.of(kept.to(DEVICE), equal_rows)
        made = (
            generated.product(x, values, layout, grid),
            generated.gradient_of_x(grad, values, layout, grid),
            generated.gradient_of_values(grad, x, values, layout),
        )
        expected = [references(x, values, grad, layout, grid, wide) for wide in (torch.float32, torch.float64)]
        for mine, single, exact, what in zip(made, *expected, ("y", "dx", "dV"), strict=True):
            assert_as_accurate(mine, single.to(dtype), exact, dtype, what, roundings(dtype))


def references(
    x: Tensor, values: Tensor, grad: Tensor, layout: BlockLayout, grid: Grid, wide: torch.dtype
) -> tuple[Tensor, ...]:
    """y, dx and dV in another dtype."""
    x, values = (each.to(wide).requires_grad_() for each in (x, values))
    y = block_sparse_reference(x, values, *layout, out_features=grid.rows * grid.block_out, block_columns=grid.columns)
    return y.detach(), *torch.autograd.grad(y, (x, values), grad.to(wide))


def test_a_layout_is_listed_once_until_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = BlockLayout.of(torch.tensor([[True, False], [True, True]]), equal_rows=False)
    first = listing.by_columns(layout, 2)
    assert listing.by_columns(layout, 2) is first
    assert (first.sources.tolist(), first.starts.tolist(), first.each) == ([0, 1, 1], [0, 2, 3], 0)
    assert first.blocks is None
    layout.columns.copy_(torch.tensor([1, 0, 1], dtype=torch.int32))
    again = listing.by_columns(layout, 2)
    assert again.sources.tolist() == [1, 0, 1]
    assert again.blocks is not None
    assert again.blocks.tolist() == [1, 0, 2]
    assert listing.by_rows(layout).blocks is None


def test_rows_without_blocks_are_listed_as_such() -> None:
    layout = BlockLayout.of(torch.zeros(3, 2, dtype=torch.bool), equal_rows=True)
    assert listing.by_rows(layout).starts.tolist() == [0, 0, 0, 0]


def test_what_is_left_to_torch_has_a_reason() -> None:
    assert generated.why_not(torch.empty(1, 8, 8), False) == "they are on cpu"

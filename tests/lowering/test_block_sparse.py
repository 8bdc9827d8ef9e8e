"""Block-sparse products against the reference, and the reading of masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structfly.errors import ArgumentError
from structfly.lowering.block_sparse import op as module
from structfly.lowering.block_sparse.layout import BlockLayout, Grid, layout_of_mask
from structfly.lowering.block_sparse.op import BLOCK_SPARSE
from structfly.lowering.block_sparse.reference import block_sparse_reference
from structfly.records.layer import LayerSizes
from tests.oracle import assert_like_eager
from tests.patterns.structures import _Largest


@st.composite
def kept_blocks(draw: st.DrawFn) -> Tensor:
    """Masks of blocks, with rows and columns that keep none."""
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    kept = torch.tensor(draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns)))
    return kept.view(rows, columns)


@given(
    kept=kept_blocks(),
    sides=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    beyond=st.tuples(st.integers(0, 8), st.integers(0, 8)),
    tokens=st.integers(0, 4),
    gathered=st.integers(1, 100),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
@settings(max_examples=60)
def test_products_are_the_references(
    kept: Tensor, sides: tuple[int, int], beyond: tuple[int, int], tokens: int, gathered: int, dtype: torch.dtype
) -> None:
    grid = Grid(*kept.shape, *sides)
    sizes = LayerSizes(max(1, grid.columns * grid.block_in - beyond[0]), max(1, grid.rows * grid.block_out - beyond[1]))
    equal = bool((kept.sum(1) == kept[0].sum()).all())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, sizes.in_features, generator=generator).to(dtype)
    values = torch.randn(int(kept.sum()), *sides, generator=generator).to(dtype)
    upstream = torch.randn(tokens, sizes.out_features, generator=generator)
    arguments = [each.requires_grad_() for each in (x, values)]
    for equal_rows in {False, equal}:
        layout = BlockLayout.of(kept, equal_rows)
        indices = [each for each in layout if each is not None]

        def fast(x: Tensor, values: Tensor, indices: list[Tensor] = indices) -> Tensor:
            return BLOCK_SPARSE(x, [values, *indices], None, [sizes.out_features, grid.columns])

        def slow(x: Tensor, values: Tensor, layout: BlockLayout = layout) -> Tensor:
            return block_sparse_reference(
                x, values, *layout, out_features=sizes.out_features, block_columns=grid.columns
            )

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_CACHED", gathered)
            assert_like_eager(fast, slow, arguments, dtype, upstream)


@given(kept=kept_blocks(), sides=st.tuples(st.sampled_from([1, 3]), st.sampled_from([2, 4])))
def test_blocks_of_a_weight_and_back(kept: Tensor, sides: tuple[int, int]) -> None:
    grid, layout = Grid(*kept.shape, *sides), BlockLayout.of(kept, equal_rows=False)
    sizes = LayerSizes(grid.columns * grid.block_in - 1, max(1, grid.rows * grid.block_out - 1))
    weight = torch.randn(sizes.out_features, sizes.in_features)
    mask = kept.repeat_interleave(sides[0], 0).repeat_interleave(sides[1], 1)
    expected = weight * mask[: sizes.out_features, : sizes.in_features]
    assert torch.equal(grid.spread(kept, sizes), mask[: sizes.out_features, : sizes.in_features])
    assert torch.equal(layout.place(layout.take(weight, grid), grid, sizes), expected)
    assert torch.equal(layout.rows(), kept.nonzero()[:, 0].int())
    assert layout.counts() == kept.sum(1).tolist()


def test_tokens_gathered_at_once_are_no_more_than_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = torch.ones(24, 3, dtype=torch.bool)
    layout = BlockLayout.of(kept, equal_rows=True)
    x = torch.randn(512, 48)
    grad, values = torch.randn(512, 24 * 16), torch.randn(72, 16, 16)
    for cached, calls in ((1, 24), (1 << 18, 24), (1 << 60, 24)):
        monkeypatch.setattr(module, "_CACHED", cached)
        with _Largest() as largest:
            module._of_values(grad, x, values, layout)
        assert largest.elements <= max(x.numel(), values.numel())
        assert len(list(module._runs(layout.counts(), x, 16))) == calls
    kept = torch.eye(24, 3, dtype=torch.bool) | torch.tensor([True, False, False])
    assert [run.count for run in module._runs(BlockLayout.of(kept, False).counts(), x, 16)] == [1, 1, 1] + [3] * 7


@given(
    kept=kept_blocks(), sides=st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4])), less=st.integers(0, 1)
)
def test_a_mask_is_read_in_the_largest_blocks(kept: Tensor, sides: tuple[int, int], less: int) -> None:
    mask = kept.repeat_interleave(sides[0], 0).repeat_interleave(sides[1], 1)
    mask = mask[: max(1, len(mask) - less), : max(1, mask.shape[1] - less)]
    if not mask.any():
        with pytest.raises(ArgumentError, match="keeps nothing"):
            layout_of_mask(mask, (1, 2, 4))
        return
    for each in (mask, mask.float(), mask.long()):
        grid, layout = layout_of_mask(each, (1, 2, 4))
        assert grid.block_out >= sides[0]
        assert grid.block_in >= sides[1]
        values = torch.ones(layout.columns.numel(), grid.block_out, grid.block_in)
        assert torch.equal(layout.place(values, grid, LayerSizes(mask.shape[1], mask.shape[0])).bool(), mask)
        counts = torch.tensor(layout.counts())
        assert (layout.starts is None) == bool((counts == counts[0]).all())


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (torch.ones(4), r"the mask has shape \(4,\)"),
        (torch.tensor([[0.0, 0.5]]), "values other than 0 and 1"),
        (torch.zeros(32, 32), "keeps nothing"),
        (torch.arange(32)[:, None].expand(32, 16) < 20, "changes between rows 19 and 20; .* sides of 16, 32, 64, 128"),
        (torch.arange(48)[None].expand(16, 48) % 24 < 16, "changes between columns 23 and 24"),
    ],
)
def test_what_is_no_mask_of_blocks_is_refused(mask: Tensor, reason: str) -> None:
    with pytest.raises(ArgumentError, match=reason):
        layout_of_mask(mask)


def test_a_layer_compiles_to_its_op() -> None:
    layout = BlockLayout.of(torch.tensor([[True, False], [True, True]]), equal_rows=False)
    indices: Any = [each for each in layout if each is not None]

    def step(x: Tensor, values: Tensor) -> Tensor:
        return BLOCK_SPARSE(x, [values, *indices], None, [32, 2]).square().sum()

    x, values = torch.randn(3, 32, dtype=torch.float64), torch.randn(3, 16, 16, dtype=torch.float64)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    results = []
    for function in (step, compiled):
        leaves = [x.clone().requires_grad_(), values.clone().requires_grad_()]
        function(*leaves).backward()
        results.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(results[0], results[1])

"""Block-sparse products against the reference, and the reading of masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from structfly.errors import ArgumentError
from structfly.lowering.block_sparse import aten as module
from structfly.lowering.block_sparse import op
from structfly.lowering.block_sparse.layout import BlockLayout, Grid, layout_of_mask
from structfly.lowering.block_sparse.op import BLOCK_SPARSE
from structfly.lowering.block_sparse.reference import block_sparse_reference
from structfly.lowering.layer_products import Applied
from structfly.records.layer import LayerSizes
from tests.oracle import assert_like_eager


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
    grid = Grid(kept.shape[0], kept.shape[1], *sides)
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
    grid, layout = Grid(kept.shape[0], kept.shape[1], *sides), BlockLayout.of(kept, equal_rows=False)
    sizes = LayerSizes(grid.columns * grid.block_in - 1, max(1, grid.rows * grid.block_out - 1))
    weight = torch.randn(sizes.out_features, sizes.in_features)
    mask = kept.repeat_interleave(sides[0], 0).repeat_interleave(sides[1], 1)
    expected = weight * mask[: sizes.out_features, : sizes.in_features]
    assert torch.equal(grid.spread(kept, sizes), mask[: sizes.out_features, : sizes.in_features])
    assert torch.equal(layout.place(layout.take(weight, grid), grid, sizes), expected)
    assert torch.equal(layout.rows(), kept.nonzero()[:, 0].int())
    assert layout.counts() == kept.sum(1).tolist()


class _Gathered(TorchDispatchMode):
    """The most elements that any index_select made, and how many there were."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.index_select.default:
            self.most, self.calls = max(self.most, result.numel()), self.calls + 1
        return result


@pytest.mark.parametrize("equal_rows", [True, False])
def test_no_more_is_gathered_at_once_than_the_input(monkeypatch: pytest.MonkeyPatch, equal_rows: bool) -> None:
    kept = torch.arange(24)[:, None] % 3 != torch.arange(3)  # 2 of 3 blocks in every row
    layout = BlockLayout.of(kept, equal_rows)
    factors = [torch.randn(48, 16, 16), *(each for each in layout if each is not None)]
    x, grad = torch.randn(512, 48), torch.randn(512, 24 * 16)
    with _Gathered() as gathered:
        op._finish(Applied(x, factors, [24 * 16, 3]), [])
    assert gathered.most <= x.numel()
    with _Gathered() as gathered:
        op._backward(grad, Applied(x, factors, [24 * 16, 3]), [], [False, True, False, False])
    assert gathered.most <= x.numel()
    with _Gathered() as gathered:
        op._backward(grad, Applied(x, factors, [24 * 16, 3]), [], [True, False, False, False])
    assert gathered.most <= grad.numel()
    for cached, runs in ((1, 8), (4 * 512 * 16, 2), (1 << 60, 1)):
        monkeypatch.setattr(module, "_CACHED", cached)
        assert len(list(module._runs([1] * 8, torch.empty(512, 8 * 16), 16))) == runs


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

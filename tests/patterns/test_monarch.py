"""Monarch: blocks of fixed rank, and the best of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structfly.errors import ArgumentError
from structfly.lowering.kronecker.op import KRONECKER
from structfly.patterns.monarch import Monarch
from structfly.patterns.structure import StructuredLinear
from structfly.records.layer import LayerSizes, LayerStatistics
from tests.patterns.structures import check_structure, statistics_of


@st.composite
def monarchs(draw: st.DrawFn, sizes: LayerSizes) -> Monarch:
    blocks_in, blocks_out = (draw(st.integers(1, min(4, size))) for size in sizes)
    most = min(-(-sizes.in_features // blocks_in), -(-sizes.out_features // blocks_out))
    return Monarch(
        blocks_in=blocks_in,
        blocks_out=blocks_out,
        block_rank=draw(st.integers(1, most)),
        strided=draw(st.booleans()),
        rematerialise=draw(st.booleans()),
    )


def blocks_of(structure: Monarch, weight: Tensor) -> list[Tensor]:
    """What each run of inputs gives to each set of outputs."""
    width, height = -(-weight.shape[1] // structure.blocks_in), -(-weight.shape[0] // structure.blocks_out)
    if structure.strided:
        sets = [weight[start :: structure.blocks_out] for start in range(structure.blocks_out)]
    else:
        sets = list(weight.split(height))
    return [block for rows in sets for block in rows.split(width, dim=1)]


@settings(max_examples=8, deadline=None)
@given(sizes=st.builds(LayerSizes, st.integers(12, 40), st.integers(12, 40)), data=st.data())
def test_layer_of_monarch(sizes: LayerSizes, data: st.DataObject) -> None:
    structure = data.draw(monarchs(sizes).filter(lambda one: one.is_worthwhile(sizes)))
    check_structure(structure, sizes, KRONECKER)


@settings(deadline=None)
@given(sizes=st.builds(LayerSizes, st.integers(1, 30), st.integers(1, 30)), data=st.data())
def test_plain_projection_has_the_tail_of_the_blocks(sizes: LayerSizes, data: st.DataObject) -> None:
    structure = data.draw(monarchs(sizes))
    weight = torch.randn(sizes.out_features, sizes.in_features, dtype=torch.float64)
    made = structure.to_dense(sizes, structure.project(weight))
    tail = sum(
        float(torch.linalg.svdvals(block)[structure.block_rank :].square().sum())
        for block in blocks_of(structure, weight)
    )
    assert float((made - weight).square().sum()) == pytest.approx(tail, rel=1e-9, abs=1e-18)
    for block in blocks_of(structure, made):
        assert torch.linalg.matrix_rank(block, atol=1e-9) <= structure.block_rank


def test_weight_by_definition() -> None:
    """W[l0::l, block k0] = w2[l0] [:, of k0] w1[k0] [of l0], as the paper has it."""
    sizes, structure = LayerSizes(12, 15), Monarch(blocks_in=4, blocks_out=3, block_rank=2)
    factors = structure.initial(sizes)
    dense = structure.to_dense(sizes, factors)
    first, second = factors["factor_1"].view(4, 2, 3, 3), factors["factor_2"].view(3, 5, 4, 2)
    for k0 in range(4):
        for l0 in range(3):
            block = second[l0, :, k0] @ first[k0, :, l0]
            torch.testing.assert_close(dense[l0::3, 3 * k0 : 3 * k0 + 3], block)


@settings(max_examples=15, deadline=None)
@given(sizes=st.builds(LayerSizes, st.integers(6, 30), st.integers(6, 30)), data=st.data())
def test_projection_follows_the_statistics(sizes: LayerSizes, data: st.DataObject) -> None:
    structure = data.draw(monarchs(sizes).filter(lambda one: one.is_worthwhile(sizes)))
    weight = torch.randn(sizes.out_features, sizes.in_features, dtype=torch.float64)
    both = statistics_of(sizes)
    for statistics in (both, LayerStatistics(both.input_covariance), LayerStatistics(None, both.output_fisher)):
        plain = statistics.loss_of(structure.to_dense(sizes, structure.project(weight)) - weight)
        found = statistics.loss_of(structure.to_dense(sizes, structure.project(weight, statistics)) - weight)
        assert found <= plain * (1 + 1e-9) + 1e-24


def test_projection_gains_much_where_inputs_are_correlated() -> None:
    sizes, structure = LayerSizes(48, 64), Monarch(blocks_in=4, blocks_out=4, block_rank=4)
    weight, statistics = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)), statistics_of(sizes)
    plain = statistics.loss_of(structure.to_dense(sizes, structure.project(weight)) - weight)
    found = statistics.loss_of(structure.to_dense(sizes, structure.project(weight, statistics)) - weight)
    assert found < plain / 4


def test_blocks_on_the_diagonal_of_the_covariances_give_the_optimum() -> None:
    """Covariances that are block-diagonal make the whitened blocks independent: the SVDs give the least loss."""
    sizes, structure = LayerSizes(12, 15), Monarch(blocks_in=3, blocks_out=3, block_rank=2, strided=False)
    full = statistics_of(sizes)
    assert full.input_covariance is not None
    assert full.output_fisher is not None
    inner = torch.block_diag(*(full.input_covariance[s : s + 4, s : s + 4] for s in range(0, 12, 4))).double()
    outer = torch.block_diag(*(full.output_fisher[s : s + 5, s : s + 5] for s in range(0, 15, 5))).double()
    weight = torch.randn(15, 12, dtype=torch.float64)
    statistics = LayerStatistics(inner, outer)
    found = statistics.loss_of(structure.to_dense(sizes, structure.project(weight, statistics)) - weight)
    whitened = torch.linalg.cholesky(outer).mT @ weight @ torch.linalg.cholesky(inner)
    least = sum(float(torch.linalg.svdvals(block)[2:].square().sum()) / 2 for block in blocks_of(structure, whitened))
    assert least * (1 - 1e-9) <= found <= least * 1.01


def test_from_scratch_has_the_variance_of_a_linear_layer() -> None:
    sizes = LayerSizes(100, 130)
    structure = Monarch(blocks_in=3, blocks_out=4, block_rank=10)
    dense = structure.to_dense(sizes, structure.initial(sizes, torch.Generator().manual_seed(0)))
    assert float(dense.square().mean()) == pytest.approx(1 / 300, rel=0.2)


def test_menu_is_spread() -> None:
    sizes = LayerSizes(384, 1536)
    shares = [each.cost(sizes, torch.float32).at(1)["parameters"] / sizes.parameters for each in Monarch.menu(sizes)]
    assert len(shares) >= 8
    assert min(shares) < 0.15
    assert 0.6 < max(shares) < 1


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"blocks_in": 9}, "blocks_in is at most 8 there"),
        ({"blocks_out": 17}, "blocks_out is at most 16 there"),
        ({"block_rank": 5}, "block_rank is at most 4 there"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changed: dict[str, int], reason: str) -> None:
    structure = Monarch(blocks_in=2, blocks_out=2, block_rank=2).model_copy(update=changed)
    with pytest.raises(ArgumentError, match=reason):
        StructuredLinear(structure, 8, 16)

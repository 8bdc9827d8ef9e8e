"""Block-sparse: which blocks are kept, and their refit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structfly.errors import ArgumentError
from structfly.lowering.block_sparse.layout import BlockLayout
from structfly.lowering.block_sparse.op import BLOCK_SPARSE
from structfly.patterns.block_sparse import BlockSparse
from structfly.patterns.structure import StructuredLinear
from structfly.records.layer import NO_STATISTICS, LayerSizes, LayerStatistics
from tests.patterns.structures import check_structure, statistics_of


@st.composite
def block_sparse(draw: st.DrawFn) -> BlockSparse:
    return BlockSparse(
        density=draw(st.floats(0.05, 0.6)),
        block_out=draw(st.sampled_from([16, 32])),
        block_in=draw(st.sampled_from([16, 32])),
        equal_rows=draw(st.booleans()),
    )


@settings(max_examples=4, deadline=None)
@given(structure=block_sparse(), sizes=st.builds(LayerSizes, st.integers(33, 80), st.integers(33, 80)))
def test_layer_of_blocks(structure: BlockSparse, sizes: LayerSizes) -> None:
    check_structure(structure, sizes, BLOCK_SPARSE)


@settings(max_examples=20)
@given(
    structure=block_sparse(),
    sizes=st.builds(LayerSizes, st.integers(33, 80), st.integers(33, 80)),
    known=st.sampled_from([(True, True), (True, False), (False, True)]),
)
def test_projection_is_no_farther_than_the_plain_one(
    structure: BlockSparse, sizes: LayerSizes, known: tuple[bool, bool]
) -> None:
    weight = torch.randn(sizes.out_features, sizes.in_features, generator=torch.Generator().manual_seed(0))
    both = statistics_of(sizes)
    statistics = LayerStatistics(both.input_covariance if known[0] else None, both.output_fisher if known[1] else None)

    def loss(statistics: LayerStatistics) -> float:
        return both_loss.loss_of(structure.to_dense(sizes, structure.project(weight, statistics)) - weight)

    both_loss = statistics
    assert loss(statistics) <= loss(NO_STATISTICS) * (1 + 1e-5)


@given(structure=block_sparse(), sizes=st.builds(LayerSizes, st.integers(33, 80), st.integers(33, 80)))
def test_plain_projection_keeps_the_largest_blocks_as_they_are(structure: BlockSparse, sizes: LayerSizes) -> None:
    weight = torch.randn(sizes.out_features, sizes.in_features)
    made = structure.to_dense(sizes, structure.project(weight))
    norms = structure.grid(sizes).split(weight).square().sum((2, 3))
    kept = structure.grid(sizes).split(made).square().sum((2, 3)) > 0
    assert torch.equal(made, weight * structure.grid(sizes).spread(kept, sizes))
    assert kept.sum() == structure.blocks(sizes)
    for row, norm in zip(kept, norms, strict=True) if structure.equal_rows else [(kept, norms)]:
        assert row.all() or norm[row].min() >= norm[~row].max()


def test_refit_is_the_least_squares_of_what_is_kept() -> None:
    sizes = LayerSizes(48, 40)
    weight = torch.randn(40, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    covariance = statistics_of(sizes).input_covariance
    assert covariance is not None
    structure = BlockSparse(density=0.5, block_out=16, block_in=16)
    factors = structure.project(weight, LayerStatistics(covariance))
    mask = BlockLayout(factors["columns"], factors["starts"]).place(
        torch.ones_like(factors["values"]), structure.grid(sizes), sizes
    )
    made = structure.to_dense(sizes, factors)
    ridge = 1e-4 * covariance.double().diagonal().mean() * torch.eye(48)
    gradient = (made - weight) @ (covariance.double() + ridge)
    assert (gradient * mask).abs().max() < 1e-9 * gradient.abs().max()
    assert gradient.abs().max() > 1e-3


def test_projection_follows_the_metric() -> None:
    weight = torch.ones(32, 32)
    weight[:, 16:] = 0.5
    weight[16:] *= 1.5
    inputs, outputs = torch.ones(32), torch.ones(32)
    inputs[16:], outputs[16:] = 100.0, 0.01
    structure = BlockSparse(density=0.25, block_out=16, block_in=16)
    places = []
    for statistics in (NO_STATISTICS, LayerStatistics(torch.diag(inputs)), LayerStatistics(None, torch.diag(outputs))):
        factors = structure.project(weight, statistics)
        places.append((factors["starts"].tolist(), factors["columns"].tolist()))
    assert places == [([0, 0, 1], [0]), ([0, 0, 1], [1]), ([0, 1, 1], [0])]


@given(
    sizes=st.builds(LayerSizes, st.integers(64, 300), st.integers(64, 300)),
    density=st.floats(0.2, 1.0),
    equal_rows=st.booleans(),
)
def test_random_blocks_are_spread_and_scaled(sizes: LayerSizes, density: float, equal_rows: bool) -> None:
    structure = BlockSparse(density=density, block_out=16, block_in=16, equal_rows=equal_rows)
    factors = structure.initial(sizes, torch.Generator().manual_seed(0))
    layout = BlockLayout(factors["columns"], factors.get("starts"))
    kept = torch.zeros(structure.grid(sizes)[:2], dtype=torch.bool)
    kept[layout.rows(), layout.columns.flatten()] = True
    assert kept.sum() == structure.blocks(sizes) == len(factors["values"])
    assert kept.sum(1).max() - kept.sum(1).min() <= 1
    assert kept.sum(0).max() - kept.sum(0).min() <= 2 + len(kept) / kept.shape[1]
    variance = structure.to_dense(sizes, factors).square().mean() * 3 * sizes.in_features
    assert 0.8 < variance < 1.2


@pytest.mark.parametrize(("sizes", "sides"), [((384, 1536), {32, 64}), ((3072, 768), {64, 128}), ((64, 64), set())])
def test_menu_saves_parameters(sizes: tuple[int, int], sides: set[int]) -> None:
    layer = LayerSizes(*sizes)
    menu = BlockSparse.menu(layer)
    assert {structure.block_in for structure in menu} == sides
    assert len({(structure.block_in, structure.blocks(layer)) for structure in menu}) == len(menu) <= 12
    for structure in menu:
        assert structure.why_not(layer) == ""
        assert structure.equal_rows
        assert structure.cost(layer, torch.float32).at(1)["parameters"] < layer.parameters


def test_blocks_larger_than_the_weight_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"block_in=32.* 16 -> 64: blocks must not be larger than the weight there"):
        StructuredLinear(BlockSparse(density=0.5), 16, 64)

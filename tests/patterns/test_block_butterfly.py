"""Block butterfly: the product of its factors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structfly.errors import ArgumentError
from structfly.lowering.kronecker.op import KRONECKER
from structfly.patterns.block_butterfly import BlockButterfly
from structfly.patterns.chain import why_not_chain
from structfly.patterns.structure import StructuredLinear
from structfly.records.layer import LayerSizes
from tests.patterns.structures import check_structure, statistics_of


@settings(max_examples=8, deadline=None)
@given(
    sizes=st.builds(LayerSizes, st.integers(14, 40), st.integers(14, 40)),
    grid=st.sampled_from([2, 4, 8]),
    rematerialise=st.booleans(),
)
def test_layer_of_block_butterfly(sizes: LayerSizes, grid: int, rematerialise: bool) -> None:
    structure = BlockButterfly(grid=grid, rematerialise=rematerialise)
    assert why_not_chain(structure.shapes(sizes), sizes) == ""
    check_structure(structure, sizes, KRONECKER)


@pytest.mark.parametrize("grid", [2, 4, 8, 16])
def test_weight_by_definition(grid: int) -> None:
    """Each factor is block-diagonal of [[D1, D2], [D3, D4]], each D block-diagonal, with blocks of the layer's."""
    block = 3
    sizes, structure = LayerSizes(grid * block, grid * block), BlockButterfly(grid=grid)
    factors = structure.initial(sizes)
    weight = torch.eye(grid * block)
    for t, factor in enumerate(factors.values(), start=1):
        size = 2**t  # of B_size: grid / size times a square of size x size blocks
        squares = []
        for a in range(grid // size):
            quarters = [
                [torch.block_diag(*(factor[d, a, i, :, j, :] for d in range(size // 2))) for j in range(2)]
                for i in range(2)
            ]
            squares.append(torch.cat([torch.cat(row, dim=1) for row in quarters]))
        weight = torch.block_diag(*squares) @ weight
    torch.testing.assert_close(structure.to_dense(sizes, factors), weight)


@settings(max_examples=10, deadline=None)
@given(sizes=st.builds(LayerSizes, st.integers(8, 40), st.integers(8, 40)), grid=st.sampled_from([4, 8]))
def test_projection_follows_the_statistics(sizes: LayerSizes, grid: int) -> None:
    structure, statistics = BlockButterfly(grid=grid), statistics_of(sizes)
    weight = torch.randn(sizes.out_features, sizes.in_features, dtype=torch.float64)
    plain = statistics.loss_of(structure.to_dense(sizes, structure.project(weight)) - weight)
    found = statistics.loss_of(structure.to_dense(sizes, structure.project(weight, statistics)) - weight)
    assert found <= plain * (1 + 1e-9) + 1e-24
    assert float((structure.to_dense(sizes, structure.project(weight)) - weight).norm()) < float(weight.norm())


def test_projection_finds_a_butterfly() -> None:
    sizes, structure = LayerSizes(48, 32), BlockButterfly(grid=8)
    factors = {name: tensor.double() for name, tensor in structure.initial(sizes).items()}
    weight = structure.to_dense(sizes, factors)
    torch.testing.assert_close(structure.to_dense(sizes, structure.project(weight)), weight)


def test_menu_is_spread() -> None:
    sizes = LayerSizes(384, 1536)
    menu = BlockButterfly.menu(sizes)
    shares = [each.cost(sizes, torch.float32).at(1)["parameters"] / sizes.parameters for each in menu]
    assert shares == sorted(shares, reverse=True)
    assert len(shares) >= 4
    assert shares[0] > 0.5
    assert shares[-1] < 0.15


@pytest.mark.parametrize(("grid", "reason"), [(6, "grid is a power of two"), (16, "grid is at most 8 there")])
def test_grids_that_do_not_fit_are_refused(grid: int, reason: str) -> None:
    with pytest.raises(ArgumentError, match=reason):
        StructuredLinear(BlockButterfly(grid=grid), 8, 16)

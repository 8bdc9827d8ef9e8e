"""Flat block butterfly: its pattern."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structfly.errors import ArgumentError
from structfly.lowering.block_sparse.op import BLOCK_SPARSE
from structfly.patterns.flat_butterfly import FlatButterfly
from structfly.patterns.structure import StructuredLinear
from structfly.records.layer import LayerSizes
from tests.patterns.structures import check_structure, statistics_of

GRIDS = [1, 2, 4, 8, 16, 32, 64]


@settings(max_examples=4, deadline=None)
@given(sizes=st.builds(LayerSizes, st.integers(8, 60), st.integers(8, 60)), data=st.data())
def test_layer_of_a_butterfly(sizes: LayerSizes, data: st.DataObject) -> None:
    grid = data.draw(st.sampled_from([4, 8]))
    structure = FlatButterfly(grid=grid, n_factors=data.draw(st.integers(0, grid.bit_length() - 2)))
    check_structure(structure, sizes, BLOCK_SPARSE)


@pytest.mark.parametrize(("grid", "n_factors"), [(n, f) for n in GRIDS for f in range(n.bit_length())])
def test_mask_is_the_definition(grid: int, n_factors: int) -> None:
    defined = {(i, i) for i in range(grid)} | {(i, i ^ 2**f) for i in range(grid) for f in range(n_factors)}
    structure = FlatButterfly(grid=grid, n_factors=n_factors)
    assert {(i, j) for i, j in structure.mask().nonzero().tolist()} == defined
    for sizes in (LayerSizes(grid, 2 * grid), LayerSizes(grid + 1, 3 * grid - 1)):
        factors = {"values": torch.ones(structure.factors(sizes)["values"].shape), "columns": structure.columns()}
        out, into = -(-sizes.out_features // grid), -(-sizes.in_features // grid)
        stretched = [
            [(r // out, c // into) in defined for c in range(sizes.in_features)] for r in range(sizes.out_features)
        ]
        assert torch.equal(structure.to_dense(sizes, factors).bool(), torch.tensor(stretched))


def test_first_order_part_of_a_product_of_butterflies() -> None:
    """M = (I + t B_2) (I + t B_4) ... (I + t B_n) has no entry of first order in t outside the mask."""
    n = 16
    factors = [
        torch.tensor([[float(j in (i, i ^ (1 << f))) for j in range(n)] for i in range(n)])
        for f in range(n.bit_length() - 1)
    ]

    def product(t: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = torch.linalg.multi_dot([torch.eye(n) + t * factor for factor in factors])
        return made

    first_order = torch.autograd.functional.jacobian(product, torch.tensor(0.0))
    mask = FlatButterfly(grid=n, n_factors=n.bit_length() - 1).mask()
    assert torch.equal((first_order + torch.eye(n)) != 0, mask)


@settings(max_examples=20)
@given(sizes=st.builds(LayerSizes, st.integers(8, 60), st.integers(8, 60)), n_factors=st.integers(0, 3))
def test_projection_is_no_farther_than_the_plain_one(sizes: LayerSizes, n_factors: int) -> None:
    structure, statistics = FlatButterfly(grid=8, n_factors=n_factors), statistics_of(sizes)
    weight = torch.randn(sizes.out_features, sizes.in_features)
    plain, fitted = (structure.to_dense(sizes, structure.project(weight, *each)) for each in ((), (statistics,)))
    assert torch.equal(plain, weight * (plain != 0))
    assert statistics.loss_of(fitted - weight) <= statistics.loss_of(plain - weight) * (1 + 1e-5)


@given(sizes=st.builds(LayerSizes, st.integers(64, 200), st.integers(64, 200)), grid=st.sampled_from([4, 16, 64]))
def test_random_blocks_are_scaled(sizes: LayerSizes, grid: int) -> None:
    structure = FlatButterfly(grid=grid, n_factors=2)
    dense = structure.to_dense(sizes, structure.initial(sizes, torch.Generator().manual_seed(0)))
    assert 0.75 < dense.square().mean() * 3 * sizes.in_features < 1.25


def test_menu_saves_parameters() -> None:
    for sizes, count in ((LayerSizes(384, 1536), 9), (LayerSizes(4096, 4096), 15)):
        menu = FlatButterfly.menu(sizes)
        assert len(menu) == count
        for structure in menu:
            density = structure.cost(sizes, torch.float32).at(1)["parameters"] / sizes.parameters
            assert density == (structure.n_factors + 1) / structure.grid < 1
    assert FlatButterfly.menu(LayerSizes(40, 40)) == []


@pytest.mark.parametrize(
    ("structure", "reason"),
    [
        (FlatButterfly(grid=6, n_factors=1), "grid must be a power of two"),
        (FlatButterfly(grid=8, n_factors=4), "n_factors is at most 3 with that grid"),
        (FlatButterfly(grid=32, n_factors=4), "grid is at most 20 there"),
    ],
)
def test_what_does_not_fit_is_refused(structure: FlatButterfly, reason: str) -> None:
    with pytest.raises(ArgumentError, match=reason):
        StructuredLinear(structure, 20, 40)

"""Pixelfly: a butterfly and a matrix of low rank, mixed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structfly.errors import ArgumentError
from structfly.lowering.block_sparse_low_rank.op import BLOCK_SPARSE_LOW_RANK
from structfly.patterns.pixelfly import Pixelfly
from structfly.patterns.structure import StructuredLinear
from structfly.records.layer import LayerSizes
from tests.oracle import assert_like_eager
from tests.patterns.structures import check_structure, statistics_of


@settings(max_examples=4, deadline=None)
@given(sizes=st.builds(LayerSizes, st.integers(12, 60), st.integers(12, 60)), data=st.data())
def test_layer_of_pixelfly(sizes: LayerSizes, data: st.DataObject) -> None:
    grid = data.draw(st.sampled_from([4, 8]))
    n_factors = data.draw(st.integers(0, grid.bit_length() - 2))
    structure = Pixelfly(grid=grid, n_factors=n_factors, rank=data.draw(st.integers(1, 3)))
    check_structure(structure, sizes, BLOCK_SPARSE_LOW_RANK)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gate_of_the_input(dtype: torch.dtype) -> None:
    sizes, structure = LayerSizes(24, 20), Pixelfly(grid=4, n_factors=1, rank=3, gated=True)
    generator = torch.Generator().manual_seed(0)
    factors = structure.initial(sizes, generator)
    assert not factors["gate"].any()
    columns = factors.pop("columns")
    factors["gate"] = torch.randn(24, generator=generator)
    x = torch.randn(2, 5, 24, generator=generator)
    names = list(factors)
    arguments = [each.to(dtype).requires_grad_() for each in (x, *factors.values())]

    def fast(x: Tensor, *learned: Tensor) -> Tensor:
        return structure.apply(sizes, {**dict(zip(names, learned, strict=True)), "columns": columns}, x, None)

    def slow(x: Tensor, *learned: Tensor) -> Tensor:
        given = {**dict(zip(names, learned, strict=True)), "columns": columns}
        sparse, low_rank = structure.sparse.to_dense(sizes, given), structure.low_rank.to_dense(sizes, given)
        gate = torch.sigmoid((x * given["gate"]).sum(-1, keepdim=True))
        return gate * (x @ sparse.t()) + (1 - gate) * (x @ low_rank.t())

    upstream = torch.randn(2, 5, 20, generator=generator)
    assert_like_eager(fast, slow, arguments, dtype, upstream)


def test_a_gated_layer_begins_as_the_plain_one_and_has_no_weight() -> None:
    linear = torch.nn.Linear(24, 20)
    plain, gated = (
        StructuredLinear.from_linear(linear, Pixelfly(grid=4, n_factors=1, rank=3, gated=each))
        for each in (False, True)
    )
    x = torch.randn(7, 24)
    torch.testing.assert_close(gated(x), plain(x))
    assert set(gated.factors) == {"values", "columns", "right", "left", "gate"}
    with pytest.raises(ArgumentError, match="depends on the input; use gated=False"):
        gated.to_dense()
    cost = gated.structure.cost(gated.sizes, torch.float32).at(10)
    assert cost["parameters"] == sum(p.numel() for p in gated.parameters()) - 20
    extra = cost["flops"] - plain.structure.cost(plain.sizes, torch.float32).at(10)["flops"]
    assert extra == 2 * 10 * 24


@settings(max_examples=20)
@given(
    sizes=st.builds(LayerSizes, st.integers(12, 60), st.integers(12, 60)),
    n_factors=st.integers(0, 3),
    rank=st.integers(1, 8),
)
def test_projection_is_no_farther_than_the_plain_one(sizes: LayerSizes, n_factors: int, rank: int) -> None:
    structure, statistics = Pixelfly(grid=8, n_factors=n_factors, rank=rank), statistics_of(sizes)
    weight = torch.randn(sizes.out_features, sizes.in_features, dtype=torch.float64)
    plain, fitted = (structure.to_dense(sizes, structure.project(weight, *each)) for each in ((), (statistics,)))
    assert statistics.loss_of(fitted - weight) <= statistics.loss_of(plain - weight) * (1 + 1e-2) + 1e-9
    alone = structure.low_rank.to_dense(sizes, structure.low_rank.project(weight))
    assert (plain - weight).norm() <= (alone - weight).norm() * (1 + 1e-9)
    assert (plain - weight).norm() <= (
        structure.sparse.to_dense(sizes, structure.sparse.project(weight)) - weight
    ).norm()


def test_settings_of_one_layer_share_the_factors_of_its_covariances(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, made, cholesky = LayerSizes(64, 96), list[int](), torch.linalg.cholesky

    def noted(matrix: Tensor) -> Tensor:
        made.append(len(matrix))
        result: Tensor = cholesky(matrix)
        return result

    monkeypatch.setattr(torch.linalg, "cholesky", noted)
    choices = [Pixelfly(grid=4, n_factors=1, rank=rank) for rank in (1, 2, 3)]
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    assert len(list(Pixelfly.losses(choices, weight, statistics_of(sizes)))) == 3
    assert made.count(64) == made.count(96) == 1


def test_projection_finds_a_sum_of_both() -> None:
    sizes, structure = LayerSizes(64, 48), Pixelfly(grid=8, n_factors=1, rank=2)
    generator = torch.Generator().manual_seed(0)
    factors = {
        name: f.double() if f.is_floating_point() else f for name, f in structure.initial(sizes, generator).items()
    }
    weight = structure.to_dense(sizes, factors)
    for statistics in ((), (statistics_of(sizes),)):
        made = structure.to_dense(sizes, structure.project(weight, *statistics))
        assert (made - weight).norm() < 0.2 * weight.norm()


@given(sizes=st.builds(LayerSizes, st.integers(64, 200), st.integers(64, 200)), rank=st.integers(16, 32))
def test_random_factors_are_scaled(sizes: LayerSizes, rank: int) -> None:
    structure = Pixelfly(grid=8, n_factors=2, rank=rank)
    dense = structure.to_dense(sizes, structure.initial(sizes, torch.Generator().manual_seed(0)))
    assert 0.7 < dense.square().mean() * 3 * sizes.in_features < 1.3


@pytest.mark.parametrize("sizes", [LayerSizes(384, 1536), LayerSizes(768, 768), LayerSizes(4096, 11008)])
def test_menu_gives_a_quarter_to_a_third_to_low_rank(sizes: LayerSizes) -> None:
    menu = Pixelfly.menu(sizes)
    assert len(menu) >= 6
    for structure in menu:
        assert structure.why_not(sizes) == ""
        parameters = structure.cost(sizes, torch.float32).at(1)["parameters"]
        share = structure.low_rank.cost(sizes, torch.float32).at(1)["parameters"] / (parameters - 1)
        assert 1 / 4 <= share <= 1 / 3
        assert parameters < sizes.parameters


def test_what_does_not_fit_is_refused() -> None:
    for structure, reason in (
        (Pixelfly(grid=3, n_factors=1, rank=1), "power of two"),
        (Pixelfly(grid=4, n_factors=1, rank=21), "rank is at most 20"),
    ):
        with pytest.raises(ArgumentError, match=reason):
            StructuredLinear(structure, 40, 20)

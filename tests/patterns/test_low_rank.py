"""Low rank: the optimum of the whitened SVD."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structfly.errors import ArgumentError
from structfly.lowering.low_rank.op import LOW_RANK
from structfly.patterns.low_rank import LowRank
from structfly.patterns.structure import StructuredLinear
from structfly.records.layer import LayerSizes, LayerStatistics
from tests.patterns.structures import check_structure, statistics_of


@settings(max_examples=8, deadline=None)
@given(sizes=st.builds(LayerSizes, st.integers(4, 40), st.integers(4, 40)), data=st.data())
def test_layer_of_low_rank(sizes: LayerSizes, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, max(1, sizes.parameters // (2 * sum(sizes)))))
    check_structure(LowRank(rank=rank, rematerialise=data.draw(st.booleans())), sizes, LOW_RANK)


@given(sizes=st.builds(LayerSizes, st.integers(2, 20), st.integers(2, 20)), data=st.data())
def test_projection_is_best_under_the_statistics(sizes: LayerSizes, data: st.DataObject) -> None:
    structure = LowRank(rank=data.draw(st.integers(1, min(sizes))))
    weight = torch.randn(sizes.out_features, sizes.in_features, dtype=torch.float64)
    statistics = statistics_of(sizes)
    factors = structure.project(weight, statistics)

    def loss(change: dict[str, torch.Tensor]) -> float:
        moved = {name: tensor + change.get(name, 0.0) for name, tensor in factors.items()}
        return statistics.loss_of(structure.to_dense(sizes, moved) - weight)

    best = loss({})
    for name, tensor in factors.items():
        for scale in (1e-3, 1e-1):
            # The projection minimises with a small ridge, so that no step gains more than that is worth.
            assert loss({name: scale * torch.randn_like(tensor)}) >= best * (1 - 1e-2) - 1e-12
    plain = statistics.loss_of(structure.to_dense(sizes, structure.project(weight)) - weight)
    assert best <= plain * (1 + 1e-2) + 1e-12


def test_frobenius_error_is_the_tail_of_singular_values() -> None:
    weight = torch.randn(30, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tail = torch.linalg.svdvals(weight)
    for structure, factors in zip(
        LowRank.menu(LayerSizes(20, 30)), LowRank.project_each(LowRank.menu(LayerSizes(20, 30)), weight), strict=True
    ):
        error = (structure.to_dense(LayerSizes(20, 30), factors) - weight).norm()
        torch.testing.assert_close(error, tail[structure.rank :].norm())


def test_menu_saves_parameters() -> None:
    sizes = LayerSizes(384, 1536)
    counts = [structure.cost(sizes, torch.float32).at(1)["parameters"] for structure in LowRank.menu(sizes)]
    assert counts == sorted(set(counts))
    assert len(counts) == 40
    assert counts[-1] < sizes.parameters


def test_too_high_a_rank_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"LowRank\(rank=9, .*8 -> 16: rank is at most 8 there"):
        StructuredLinear(LowRank(rank=9), 8, 16)


def test_the_bias_takes_up_the_mean_of_the_change() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(12, 9, dtype=torch.float64)
    x = torch.randn(5000, 12, dtype=torch.float64) + 3.0
    covariance = torch.cov(x.t(), correction=0)
    statistics = LayerStatistics(covariance.float(), None, x.mean(0).float(), len(x))
    layer = StructuredLinear.from_linear(linear, LowRank(rank=3), statistics)
    change = layer(x) - linear(x)
    torch.testing.assert_close(change.mean(0), torch.zeros(9, dtype=torch.float64), atol=1e-5, rtol=0)
    rise = 0.5 * change.square().sum(1).mean()
    assert statistics.loss_of((layer.to_dense() - linear.weight).detach()) == pytest.approx(rise.item(), rel=1e-4)

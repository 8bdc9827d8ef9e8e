"""BLAST: alternating least squares under the metric."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structfly.errors import ArgumentError
from structfly.lowering.blast.op import BLAST
from structfly.patterns.blast import Blast
from structfly.patterns.low_rank import LowRank
from structfly.patterns.structure import StructuredLinear
from structfly.patterns.whitening import with_ridge
from structfly.records.layer import NO_STATISTICS, LayerSizes
from tests.patterns.structures import check_structure, statistics_of


@settings(max_examples=5, deadline=None)
@given(sizes=st.builds(LayerSizes, st.integers(9, 40), st.integers(9, 40)), data=st.data())
def test_layer_of_blast(sizes: LayerSizes, data: st.DataObject) -> None:
    structure = Blast(
        rank=data.draw(st.integers(1, 4)),
        row_blocks=data.draw(st.integers(1, 3)),
        column_blocks=data.draw(st.integers(1, 3)),
        rematerialise=data.draw(st.booleans()),
    )
    check_structure(structure, sizes, BLAST)


@settings(max_examples=20, deadline=None)
@given(sizes=st.builds(LayerSizes, st.integers(4, 20), st.integers(4, 20)), data=st.data())
def test_projection_follows_the_statistics(sizes: LayerSizes, data: st.DataObject) -> None:
    blocks = st.sampled_from([1, 2])
    structure = Blast(
        rank=data.draw(st.integers(1, min(sizes))),
        row_blocks=data.draw(blocks),
        column_blocks=data.draw(blocks),
        iterations=3,
    )
    weight = torch.randn(sizes.out_features, sizes.in_features, dtype=torch.float64)
    statistics = statistics_of(sizes)

    def loss(candidate: Blast | LowRank, factors: dict[str, torch.Tensor]) -> float:
        return statistics.loss_of(candidate.to_dense(sizes, factors) - weight)

    best = loss(structure, structure.project(weight, statistics))
    low_rank = LowRank(rank=structure.rank)
    assert best <= loss(structure, structure.project(weight)) * (1 + 1e-6) + 1e-9
    assert best <= loss(low_rank, low_rank.project(weight, statistics)) * (1 + 1e-6) + 1e-9
    if structure.row_blocks == structure.column_blocks == 1:
        error = (structure.to_dense(sizes, structure.project(weight)) - weight).norm()
        torch.testing.assert_close(error, torch.linalg.svdvals(weight)[structure.rank :].norm(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("with_statistics", [False, True])
def test_every_round_lowers_the_loss_and_ends_in_a_minimum_of_what_moved_last(with_statistics: bool) -> None:
    sizes = LayerSizes(23, 18)
    weight = torch.randn(18, 23, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    statistics = statistics_of(sizes) if with_statistics else NO_STATISTICS
    metrics = [with_ridge(m, weight) for m in (statistics.output_fisher, statistics.input_covariance)]
    losses = []
    for iterations in (1, 2, 4, 16):
        structure = Blast(rank=4, row_blocks=2, column_blocks=3, iterations=iterations)
        factors = {name: tensor.requires_grad_() for name, tensor in structure.project(weight, statistics).items()}
        change = structure.to_dense(sizes, factors) - weight
        outer = change if metrics[0] is None else metrics[0] @ change
        inner = change if metrics[1] is None else change @ metrics[1]
        loss = (outer * inner).sum()
        losses.append(loss.item())
        (gradient,) = torch.autograd.grad(loss, factors["left"])
        assert (gradient * factors["left"])[-1].abs().max() <= 1e-5 * loss
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.95 * losses[0]


def test_projection_finds_blocks_that_no_low_rank_weight_has() -> None:
    sizes = LayerSizes(32, 32)
    blocks = torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = torch.block_diag(*(each @ each.t() for each in blocks))  # of rank 8, and of 4 as a BLAST weight
    structure = Blast(rank=4, row_blocks=2, column_blocks=2)
    torch.testing.assert_close(structure.to_dense(sizes, structure.project(weight)), weight, rtol=0, atol=1e-6)


def test_initial_weight_has_the_variance_of_a_linear_layer() -> None:
    sizes = LayerSizes(240, 180)
    structure = Blast(rank=120, row_blocks=2, column_blocks=3)
    weight = structure.to_dense(sizes, structure.initial(sizes, torch.Generator().manual_seed(0)))
    assert weight.var().item() == pytest.approx(1 / (3 * 240), rel=0.1)


def test_menu_is_spread_and_saves_parameters() -> None:
    sizes = LayerSizes(384, 1536)
    menu = Blast.menu(sizes)
    shares = [structure.cost(sizes, torch.float32).at(1)["parameters"] / sizes.parameters for structure in menu]
    assert len(menu) == 15
    assert min(shares) < 0.11
    assert 0.7 < max(shares) < 1
    assert all(structure.why_not(sizes) == "" for structure in menu)
    assert all(structure.why_not(LayerSizes(3, 5)) == "" for structure in Blast.menu(LayerSizes(3, 5)))


@pytest.mark.parametrize(
    ("structure", "reason"),
    [
        (Blast(rank=9, row_blocks=2, column_blocks=2), "rank is at most 8"),
        (Blast(rank=2, row_blocks=9, column_blocks=2), "9 row blocks of 2 are more than 16 features fill"),
        (Blast(rank=2, row_blocks=2, column_blocks=5), "5 column blocks of 2 are more than 8 features fill"),
    ],
)
def test_what_does_not_fit_is_refused(structure: Blast, reason: str) -> None:
    with pytest.raises(ArgumentError, match=reason):
        StructuredLinear(structure, 8, 16)

"""Pivoted low rank: the weight of low rank itself, in fewer numbers."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structfly.errors import ArgumentError
from structfly.lowering.pivoted_low_rank.op import PIVOTED_LOW_RANK
from structfly.lowering.pivoted_low_rank.reference import pivoted_low_rank_reference
from structfly.patterns.low_rank import LowRank
from structfly.patterns.pivoted_low_rank import PivotedLowRank
from structfly.patterns.structure import StructuredLinear
from structfly.records.layer import LayerSizes
from tests.patterns.structures import check_structure, layer_of, statistics_of

sizes_drawn = st.builds(LayerSizes, st.integers(4, 40), st.integers(4, 40))


@settings(max_examples=6, deadline=None)
@given(sizes=sizes_drawn, data=st.data())
def test_layer_of_pivoted_low_rank(sizes: LayerSizes, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, max(1, min(sizes) // 2)))
    check_structure(PivotedLowRank(rank=rank, rematerialise=data.draw(st.booleans())), sizes, PIVOTED_LOW_RANK)


@given(sizes=sizes_drawn, data=st.data())
def test_projection_is_the_one_of_low_rank_in_fewer_numbers(sizes: LayerSizes, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(sizes.in_features, sizes.out_features - 1)))
    weight = torch.randn(sizes.out_features, sizes.in_features, dtype=torch.float64)
    pivoted, plain = PivotedLowRank(rank=rank), LowRank(rank=rank)
    for statistics in (statistics_of(sizes),):
        dense = pivoted.to_dense(sizes, pivoted.project(weight, statistics))
        torch.testing.assert_close(
            dense, plain.to_dense(sizes, plain.project(weight, statistics)), rtol=1e-6, atol=1e-8
        )
    counts = [each.cost(sizes, torch.float32).at(1)["parameters"] for each in (pivoted, plain)]
    assert counts[0] == counts[1] - rank**2


def test_op_is_its_reference() -> None:
    layer = layer_of(PivotedLowRank(rank=5), LayerSizes(12, 20), torch.float64)
    x = torch.randn(3, 12, dtype=torch.float64)
    pivots, mixing, order = layer.factors.values()
    expected = pivoted_low_rank_reference(x, pivots, mixing, order, layer.bias)
    torch.testing.assert_close(layer(x), expected)


def test_mixtures_are_not_large() -> None:
    """Column-pivoted QR keeps them so in practice, where any rows would do in exact arithmetic."""
    torch.manual_seed(0)
    weight = torch.randn(300, 200) * torch.logspace(0, -3, 300)[:, None]
    mixing = PivotedLowRank(rank=80).project(weight)["mixing"]
    assert mixing.abs().max() < 20


@pytest.mark.parametrize("sizes", [LayerSizes(384, 384), LayerSizes(384, 1536), LayerSizes(1536, 384)])
def test_menu_reaches_from_little_to_nearly_all(sizes: LayerSizes) -> None:
    counts = [each.cost(sizes, torch.float32).at(1)["parameters"] for each in PivotedLowRank.menu(sizes)]
    assert counts == sorted(set(counts))
    assert len(counts) >= 20
    assert counts[-1] < sizes.parameters
    shares = [count / sizes.parameters for count in counts]
    assert max(b - a for a, b in pairwise(shares)) < 0.08


def test_too_high_a_rank_is_refused() -> None:
    with pytest.raises(ArgumentError, match="rank is at most 7 there"):
        StructuredLinear(PivotedLowRank(rank=8), 16, 8)

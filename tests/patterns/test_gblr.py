"""GBLR cut to tiles: greedy projection under the metric."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structfly.errors import ArgumentError
from structfly.lowering.gblr.op import GBLR as OP
from structfly.patterns.gblr import GBLR
from structfly.patterns.structure import StructuredLinear
from structfly.records.layer import LayerSizes
from tests.patterns.structures import check_structure, statistics_of


@st.composite
def structures(draw: st.DrawFn, sizes: LayerSizes) -> GBLR:
    tile, groups = draw(st.integers(2, 5)), draw(st.integers(1, 3))
    inputs, outputs = (-(-features // tile) for features in sizes)
    return GBLR(
        tile=tile,
        group=draw(st.integers(1, 3)),
        groups=groups,
        right_tiles=draw(st.integers(groups, groups * inputs)),
        left_tiles=draw(st.integers(groups, groups * outputs)),
        rematerialise=draw(st.booleans()),
    )


SIZES = st.builds(LayerSizes, st.integers(9, 30), st.integers(9, 30))


@settings(max_examples=5, deadline=None)
@given(sizes=SIZES, data=st.data())
def test_layer_of_gblr(sizes: LayerSizes, data: st.DataObject) -> None:
    check_structure(data.draw(structures(sizes)), sizes, OP)


@settings(max_examples=20, deadline=None)
@given(sizes=SIZES, data=st.data())
def test_projection_has_intervals_and_follows_the_statistics(sizes: LayerSizes, data: st.DataObject) -> None:
    structure = data.draw(structures(sizes))
    weight = torch.randn(sizes.out_features, sizes.in_features, dtype=torch.float64)
    statistics = statistics_of(sizes)
    factors = structure.project(weight, statistics)
    for side in ("right", "left"):
        places: dict[int, list[int]] = {}
        for group, place in factors[f"{side}_index"].t().tolist():
            places.setdefault(group, []).append(place)
        assert list(places) == list(range(structure.groups))
        assert all(of == list(range(of[0], of[0] + len(of))) for of in places.values())
    best = statistics.loss_of(structure.to_dense(sizes, factors) - weight)
    plain = statistics.loss_of(structure.to_dense(sizes, structure.project(weight)) - weight)
    assert best <= plain * (1 + 1e-9)
    assert best < statistics.loss_of(weight)


def test_more_sweeps_and_more_tiles_lower_the_error() -> None:
    sizes = LayerSizes(48, 32)
    weight = torch.randn(32, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors = []
    for tiles, sweeps in ((4, 1), (4, 2), (4, 8), (8, 8), (12, 8)):
        structure = GBLR(tile=4, group=2, groups=4, right_tiles=tiles, left_tiles=tiles, sweeps=sweeps)
        errors.append((structure.to_dense(sizes, structure.project(weight)) - weight).norm().item())
    assert errors == sorted(errors, reverse=True)


def test_one_full_group_is_the_truncated_svd() -> None:
    sizes = LayerSizes(10, 14)
    weight = torch.randn(14, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    structure = GBLR(tile=4, group=3, groups=1, right_tiles=3, left_tiles=4, sweeps=100)
    error = (structure.to_dense(sizes, structure.project(weight)) - weight).norm()
    torch.testing.assert_close(error, torch.linalg.svdvals(weight)[3:].norm(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("with_statistics", [False, True])
def test_blocks_that_stand_apart_are_found(with_statistics: bool) -> None:
    sizes = LayerSizes(32, 24)
    generator = torch.Generator().manual_seed(0)
    weight = torch.zeros(24, 32, dtype=torch.float64)
    for rows, columns in ((slice(0, 8), slice(16, 24)), (slice(16, 24), slice(0, 8)), (slice(8, 16), slice(24, 32))):
        pair = [torch.randn(8, 2, dtype=torch.float64, generator=generator) for _ in range(2)]
        weight[rows, columns] = pair[0] @ pair[1].t()
    structure = GBLR(tile=4, group=2, groups=3, right_tiles=6, left_tiles=6)
    factors = structure.project(weight, statistics_of(sizes)) if with_statistics else structure.project(weight)
    torch.testing.assert_close(structure.to_dense(sizes, factors), weight, rtol=0, atol=1e-6)


def test_initial_weight_has_the_variance_of_a_linear_layer() -> None:
    sizes = LayerSizes(160, 120)
    structure = GBLR(tile=8, group=4, groups=40, right_tiles=400, left_tiles=300)
    weight = structure.to_dense(sizes, structure.initial(sizes, torch.Generator().manual_seed(0)))
    assert weight.square().mean().item() == pytest.approx(1 / (3 * 160), rel=0.1)
    assert (weight != 0).double().mean() > 0.99


@pytest.mark.parametrize("sizes", [LayerSizes(384, 1536), LayerSizes(100, 70), LayerSizes(9, 5)])
def test_menu_is_spread_and_saves_parameters(sizes: LayerSizes) -> None:
    menu = GBLR.menu(sizes)
    shares = [structure.cost(sizes, torch.float32).at(1)["parameters"] / sizes.parameters for structure in menu]
    assert all(structure.why_not(sizes) == "" for structure in menu)
    assert all(share < 1 for share in shares)
    if sizes.parameters > 5000:
        assert len(menu) == 10
        assert min(shares) < 0.15
        assert max(shares) > 0.7


def test_tiles_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"right_tiles is from 2, one for each group, to 4 there"):
        StructuredLinear(GBLR(tile=4, group=1, groups=2, right_tiles=5, left_tiles=2), 8, 16)
    with pytest.raises(ArgumentError, match=r"left_tiles is from 2, one for each group, to 8 there"):
        StructuredLinear(GBLR(tile=4, group=1, groups=2, right_tiles=2, left_tiles=1), 8, 16)

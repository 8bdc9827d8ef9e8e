"""Kronecker-sparse chains and lattices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structfly.errors import ArgumentError
from structfly.lowering.kronecker.op import KRONECKER
from structfly.patterns.chain_projection import split
from structfly.patterns.kronecker import KroneckerSparse, balanced_axes
from structfly.patterns.monarch import Monarch
from structfly.patterns.structure import StructuredLinear
from structfly.records.layer import LayerSizes
from tests.patterns.structures import check_structure, statistics_of

_AXES = st.integers(1, 3).flatmap(
    lambda count: st.tuples(*(st.lists(st.integers(1, 4), min_size=count, max_size=count) for _ in range(2)))
)


@st.composite
def chains(draw: st.DrawFn) -> tuple[KroneckerSparse, LayerSizes]:
    """A lattice and sizes that it fills, or nearly so; sometimes within blocks, as a chain's middle is."""
    axes_in, axes_out = draw(_AXES)
    structure = KroneckerSparse.lattice(axes_in, axes_out, draw(st.integers(1, 3)))
    a, d = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (1, 3)]))
    structure = KroneckerSparse(
        patterns=tuple((a * each[0], each[1], each[2], d * each[3]) for each in structure.patterns),
        rematerialise=draw(st.booleans()),
    )
    most = LayerSizes(a * d * math.prod(axes_in), a * d * math.prod(axes_out))
    return structure, LayerSizes(*(draw(st.integers(max(1, size - 2), size)) for size in most))


@settings(max_examples=8, deadline=None)
@given(drawn=chains().filter(lambda drawn: drawn[0].is_worthwhile(drawn[1]) and min(drawn[1]) > 2))
def test_layer_of_a_chain(drawn: tuple[KroneckerSparse, LayerSizes]) -> None:
    check_structure(*drawn, KRONECKER)


@settings(deadline=None)
@given(drawn=chains())
def test_weight_is_the_product_of_factors_with_their_supports(drawn: tuple[KroneckerSparse, LayerSizes]) -> None:
    structure, sizes = drawn
    factors = {name: tensor.double() for name, tensor in structure.initial(sizes).items()}
    product = torch.eye(structure.shapes(sizes)[0].features_in, dtype=torch.float64)
    for (a, b, c, d), factor in zip(reversed(structure.patterns), factors.values(), strict=True):
        support = torch.kron(torch.kron(torch.eye(a), torch.ones(b, c)), torch.eye(d)).bool()
        # Nonzero entries in order of rows: (a, b, d), and columns c in each.
        entries = torch.zeros(support.shape, dtype=torch.float64)
        entries[support] = factor.view(d, a, b, c).permute(1, 2, 0, 3).flatten()
        product = entries @ product
    expected = product[: sizes.out_features, : sizes.in_features]
    torch.testing.assert_close(structure.to_dense(sizes, factors), expected)


@settings(max_examples=30, deadline=None)
@given(drawn=chains(), seed=st.integers(0, 3))
def test_projection_finds_a_weight_that_is_such_a_chain(drawn: tuple[KroneckerSparse, LayerSizes], seed: int) -> None:
    structure, sizes = drawn
    sizes = LayerSizes(structure.shapes(sizes)[0].features_in, structure.shapes(sizes)[-1].features_out)
    factors = structure.initial(sizes, torch.Generator().manual_seed(seed))
    weight = structure.to_dense(sizes, {name: tensor.double() for name, tensor in factors.items()})
    for statistics in ((), (statistics_of(sizes),)):
        torch.testing.assert_close(structure.to_dense(sizes, structure.project(weight, *statistics)), weight)


@settings(max_examples=20, deadline=None)
@given(drawn=chains())
def test_projection_follows_the_statistics(drawn: tuple[KroneckerSparse, LayerSizes]) -> None:
    structure, sizes = drawn
    weight = torch.randn(sizes.out_features, sizes.in_features, dtype=torch.float64)
    statistics = statistics_of(sizes)
    plain = statistics.loss_of(structure.to_dense(sizes, structure.project(weight)) - weight)
    found = statistics.loss_of(structure.to_dense(sizes, structure.project(weight, statistics)) - weight)
    assert found <= plain * (1 + 1e-9) + 1e-24


@settings(max_examples=20, deadline=None)
@given(drawn=chains(), seed=st.integers(0, 100))
def test_the_factors_of_a_projection_do_not_cancel(drawn: tuple[KroneckerSparse, LayerSizes], seed: int) -> None:
    structure, sizes = drawn
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(sizes.out_features, sizes.in_features, dtype=torch.float64, generator=generator)
    factors = structure.project(weight, statistics_of(sizes, seed))
    shapes = structure.shapes(sizes)
    padded = LayerSizes(shapes[0].features_in, shapes[-1].features_out)
    sizes_of = [structure.to_dense(padded, f).norm() for f in (factors, {n: f.abs() for n, f in factors.items()})]
    # The entries of r orthonormal columns add up to at most sqrt(r) times what they are.
    bound = math.prod(left.j * left.a // right.a * left.p for left, right in zip(shapes[1:], shapes, strict=False))
    assert sizes_of[1] <= bound**0.5 * sizes_of[0] * (1 + 1e-9)


def test_long_chains_are_refined_beyond_the_hierarchical_svd() -> None:
    sizes, structure = LayerSizes(64, 64), KroneckerSparse.lattice((4, 4, 4), (4, 4, 4), 2)
    weight = torch.randn(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shapes = structure.shapes(sizes)
    names = structure.factors(sizes)
    first = structure.to_dense(sizes, dict(zip(names, split(weight, shapes), strict=True)))
    found = structure.to_dense(sizes, structure.project(weight))
    assert (found - weight).norm() < 0.99 * (first - weight).norm()


def test_lattice_of_two_axes_is_monarch() -> None:
    sizes = LayerSizes(20, 18)
    lattice = KroneckerSparse.lattice((4, 5), (6, 3), 2)
    assert lattice.shapes(sizes) == Monarch(blocks_in=4, blocks_out=3, block_rank=2).shapes(sizes)


def test_lattice_of_12288() -> None:
    sizes, lattice = LayerSizes(12288, 12288), KroneckerSparse.lattice((16, 24, 32), (16, 24, 32))
    assert lattice.why_not(sizes) == ""
    assert lattice.cost(sizes, torch.float32).at(1)["parameters"] == 12288 * (16 + 24 + 32)


@pytest.mark.parametrize(
    ("size", "axes"), [(12288, (16, 24, 32)), (4096, (16, 16, 16)), (768, (8, 8, 12)), (7, (2, 2, 2))]
)
def test_balanced_axes(size: int, axes: tuple[int, ...]) -> None:
    assert balanced_axes(size, 3) == axes


def test_menu_is_spread() -> None:
    sizes = LayerSizes(384, 1536)
    menu = KroneckerSparse.menu(sizes)
    shares = [each.cost(sizes, torch.float32).at(1)["parameters"] / sizes.parameters for each in menu]
    assert all(each.why_not(sizes) == "" for each in menu)
    assert len(shares) >= 6
    assert min(shares) < 0.05
    assert 0.2 < max(shares) < 1


@pytest.mark.parametrize(
    ("patterns", "reason"),
    [
        (((1, 4, 2, 1),), "the chain takes 2 features; it must take 8 or more"),
        (((1, 4, 8, 1),), "the chain gives 4 features; it must give 16 or more"),
        (((2, 8, 4, 1), (1, 4, 4, 2)), "the first's a must divide the second's"),
        (((1, 8, 2, 2), (2, 3, 4, 1)), "2 columns must be 2 times the rank, and 3 rows 2 times it"),
    ],
)
def test_what_is_no_chain_is_refused(patterns: tuple[tuple[int, int, int, int], ...], reason: str) -> None:
    with pytest.raises(ArgumentError, match=reason):
        StructuredLinear(KroneckerSparse(patterns=patterns), 8, 16)


def test_lattices_have_equally_many_axes() -> None:
    with pytest.raises(ArgumentError, match="got 2 and 1"):
        KroneckerSparse.lattice((2, 2), (4,))

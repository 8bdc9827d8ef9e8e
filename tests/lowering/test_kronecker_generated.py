"""Generated products with Monarch and Kronecker-sparse factors: interpreted on a CPU against the reference."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structfly import StructuredLinear, measure
from structfly.lowering.kronecker import aten, lattice, monarch
from structfly.lowering.kronecker.op import KRONECKER
from structfly.lowering.kronecker.reference import FactorShape, kronecker_reference
from structfly.lowering.layer_products import Applied, Products, chosen
from structfly.patterns.chain import Chain
from structfly.patterns.kronecker import KroneckerSparse
from structfly.patterns.monarch import Monarch
from structfly.records.layer import LayerSizes
from tests.lowering.block_products.test_products import DEVICE, DTYPES, roundings
from tests.oracle import assert_as_accurate, assert_like_eager


def compare(
    products: ModuleType | SimpleNamespace,
    shapes: Sequence[FactorShape],
    sizes: LayerSizes,
    tokens: int,
    bias: bool,
    dtype: torch.dtype,
) -> None:
    """Value and gradients that ``products`` makes, with float64's and those of torch in the same dtype."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    x, grad = random(tokens, sizes.in_features), random(tokens, sizes.out_features)
    factors = [random(*shape) for shape in shapes]
    added = random(sizes.out_features) if bias else None
    every = [True] * (1 + len(factors))
    names = ("y", "dx", *(f"dw{t}" for t in range(1, len(factors) + 1)))
    call = Applied(x, factors, [sizes.out_features], added)
    z = products.between(call)
    made = [products.finish(call, z), *products.backward(grad, call, z, every)]

    def expected(wide: torch.dtype) -> list[Tensor]:
        leaves = [each.to(wide).requires_grad_() for each in (x, *factors)]
        y = kronecker_reference(leaves[0], leaves[1:], sizes.out_features, None if added is None else added.to(wide))
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(wide))]

    by_torch = Applied(
        x.cpu(), [each.cpu() for each in factors], [sizes.out_features], None if added is None else added.cpu()
    )
    kept = aten.between(by_torch)
    theirs = [aten.finish(by_torch, kept), *aten.backward(grad.cpu(), by_torch, kept, every)]
    assert [each.shape for each in z] == [each.shape for each in kept]
    for mine, same, exact, what in zip(made, theirs, expected(torch.float64), names, strict=True):
        assert mine is not None
        assert same is not None
        found, eager = mine.cpu().view(exact.shape), same.reshape(exact.shape)
        assert_as_accurate(found, eager, exact.cpu(), dtype, what, roundings(dtype))


@st.composite
def monarchs(draw: st.DrawFn) -> tuple[Monarch, LayerSizes]:
    """Layers whose blocks have sides of eights, of which the last may reach beyond the layer."""
    blocks_in, blocks_out = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    inputs, outputs, rank = (8 * draw(st.integers(1, 4)) for _ in range(3))
    sizes = LayerSizes(
        blocks_in * inputs - draw(st.integers(0, blocks_in - 1)),
        blocks_out * outputs - draw(st.integers(0, blocks_out - 1)),
    )
    strided = draw(st.booleans())
    return Monarch(blocks_in=blocks_in, blocks_out=blocks_out, block_rank=rank, strided=strided), sizes


@settings(max_examples=12, deadline=None)
@given(
    layer=monarchs(),
    tokens=st.integers(0, 40),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_value_and_gradients_are_those_of_the_reference(
    layer: tuple[Monarch, LayerSizes], tokens: int, bias: bool, dtype: torch.dtype
) -> None:
    structure, sizes = layer
    compare(monarch, structure.shapes(sizes), sizes, tokens, bias, dtype)


@settings(max_examples=24, deadline=None)
@given(
    layer=monarchs(),
    tokens=st.integers(0, 40),
    blocks=st.integers(1, 4),
    rows=st.integers(1, 50),
    dtype=st.sampled_from(DTYPES),
)
def test_gradients_where_nothing_was_kept_are_those_of_the_reference(
    layer: tuple[Monarch, LayerSizes], tokens: int, blocks: int, rows: int, dtype: torch.dtype
) -> None:
    structure, sizes = layer

    def backward(grad: Tensor, call: Applied, _: object, wanted: Sequence[bool]) -> list[Tensor | None]:
        return monarch.backward_again(grad, call, wanted)

    products = SimpleNamespace(between=monarch.between, finish=monarch.finish, backward=backward)
    with (
        mock.patch.object(monarch, "blocks_at_a_time", return_value=blocks),
        mock.patch.object(monarch, "rows_at_a_time", return_value=rows),
    ):
        compare(products, structure.shapes(sizes), sizes, tokens, False, dtype)


@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=3)))
@pytest.mark.parametrize("rank", [8, 24])
def test_only_gradients_that_are_wanted_are_made(wanted: tuple[bool, bool, bool], rank: int) -> None:
    structure, sizes = Monarch(blocks_in=2, blocks_out=2, block_rank=rank, strided=False), LayerSizes(32, 48)
    factors = [torch.randn(shape).to(DEVICE, torch.bfloat16) for shape in structure.shapes(sizes)]
    x, grad = (torch.randn(9, size).to(DEVICE, torch.bfloat16) for size in sizes)
    call = Applied(x, factors, [sizes.out_features])
    every = monarch.backward_again(grad, call, (True, True, True))
    for made, whole, wants in zip(monarch.backward_again(grad, call, wanted), every, wanted, strict=True):
        assert (made is not None) == wants
        torch.testing.assert_close(made, whole if wants else None)


@pytest.mark.parametrize("rank", [8, 16, 32])
@pytest.mark.parametrize("rows", [1, 7, 16, 40])
def test_gradients_take_the_place_of_nothing_that_is_needed(rank: int, rows: int) -> None:
    structure, sizes = Monarch(blocks_in=2, blocks_out=2, block_rank=rank, strided=False), LayerSizes(128, 48)
    factors = [torch.randn(shape).to(DEVICE, torch.bfloat16) for shape in structure.shapes(sizes)]
    x, grad = (torch.randn(40, size).to(DEVICE, torch.bfloat16) for size in sizes)
    products = monarch._Backward(grad, Applied(x, factors, [sizes.out_features]))
    every = (True, True, True)
    torch.testing.assert_close(products.in_place(every, rows), products.in_groups(every, 2))


@pytest.mark.parametrize(
    ("blocks", "out_features", "rows"), [(2, 4096, 1024), (4, 4096, 1024), (16, 4096, 2048), (4, 16384, 8192)]
)
def test_dx_is_made_of_as_many_rows_as_leave_memory_below_the_dense_layers(
    blocks: int, out_features: int, rows: int
) -> None:
    structure = Monarch(blocks_in=blocks, blocks_out=blocks, block_rank=4096 // blocks**2, strided=False)
    factors = [torch.empty(shape, device="meta") for shape in structure.shapes(LayerSizes(4096, out_features))]
    call = Applied(torch.empty(16384, 4096, device="meta"), factors, [out_features])
    assert monarch.rows_at_a_time(call, 4096) == rows
    assert rows * 4096 + sum(factor.numel() for factor in factors) < 4096 * out_features or blocks == 2


@pytest.mark.parametrize("blocks", [4, 16])
@pytest.mark.parametrize("out_features", [4096, 16384])
def test_a_group_takes_no_more_than_a_dense_gradient_would_beyond_the_factors(blocks: int, out_features: int) -> None:
    structure = Monarch(blocks_in=blocks, blocks_out=blocks, block_rank=4096 // blocks**2, strided=False)
    factors = [torch.empty(shape, device="meta") for shape in structure.shapes(LayerSizes(4096, out_features))]
    call = Applied(torch.empty(16384, 4096, device="meta"), factors, [out_features])
    numbers = 16384 * 4096 // blocks  # of z, of a block
    size = monarch.blocks_at_a_time(call, numbers, blocks)
    room = 4096 * out_features - sum(factor.numel() for factor in factors)
    assert size == 1 or size * numbers <= room
    assert -(-blocks // size) == -(-blocks // max(1, min(blocks, room // numbers)))


@pytest.mark.gpu
def test_memory_of_layers_that_keep_nothing_is_below_the_dense_ones() -> None:
    sizes = LayerSizes(1024, 4096)
    structure = Monarch(blocks_in=4, blocks_out=4, block_rank=64, strided=False, rematerialise=True)
    x = torch.randn(4096, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    peaks = []
    for layer in (StructuredLinear(structure, *sizes, bias=False), torch.nn.Linear(*sizes, bias=False)):
        layer.to("cuda", torch.bfloat16)
        leaves = [x, *layer.parameters()]

        def step(layer: torch.nn.Module = layer, leaves: list[Tensor] = leaves) -> object:
            return torch.autograd.grad(layer(x), leaves, upstream)

        peaks.append(measure.peak_extra_memory(step, "cuda"))
    assert peaks[0] < peaks[1]


@st.composite
def lattices(draw: st.DrawFn) -> tuple[list[FactorShape], LayerSizes]:
    """Chains of up to three factors, each along an axis that is before, between or behind others."""
    count = draw(st.integers(1, 3))
    eights = st.sampled_from((8, 16, 24))
    features = draw(eights) * draw(st.sampled_from((1, 8, 16)))
    shapes: list[FactorShape] = []
    for _ in range(count):
        d = draw(st.sampled_from([n for n in (1, 8, 16, 24) if features % (8 * n) == 0]))
        j = draw(st.sampled_from([n for n in (8, 16, 24, 32) if features // d % n == 0]))
        i = draw(st.sampled_from((8, 16, 24) if features <= 256 else (8,)))
        shapes.append(FactorShape(d=d, a=features // (d * j), i=i, q=1, j=j, p=1))
        features = shapes[-1].features_out
    less = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    return shapes, LayerSizes(shapes[0].features_in - less[0], features - less[1])


@settings(max_examples=15, deadline=None)
@given(
    layer=lattices(),
    tokens=st.integers(0, 40),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_chains_along_axes_are_those_of_the_reference(
    layer: tuple[list[FactorShape], LayerSizes], tokens: int, bias: bool, dtype: torch.dtype
) -> None:
    compare(lattice, *layer, tokens, bias, dtype)


@settings(max_examples=3, deadline=None)
@given(tokens=st.integers(1, 40), bias=st.booleans())
def test_large_matrices_have_tiles_of_their_own(tokens: int, bias: bool) -> None:
    shapes = [FactorShape(1, 2, 64, 1, 72, 1), FactorShape(8, 1, 8, 1, 16, 1)]
    compare(lattice, shapes, LayerSizes(144, 64), tokens, bias, torch.bfloat16)


@given(wanted=st.lists(st.booleans(), min_size=3, max_size=3))
@settings(max_examples=8, deadline=None)
def test_what_is_not_asked_for_is_not_made(wanted: list[bool]) -> None:
    factors = [torch.ones(1, 2, 16, 1, 8, 1, dtype=torch.bfloat16), torch.ones(2, 1, 1, 8, 16, 1, dtype=torch.bfloat16)]
    call = Applied(torch.ones(3, 16, dtype=torch.bfloat16, device=DEVICE), [f.to(DEVICE) for f in factors], [16])
    made = monarch.backward(call.x, call, monarch.between(call), wanted)
    assert [each is not None for each in made] == wanted


def _shapes(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]


@pytest.mark.parametrize(
    ("factors", "reason"),
    [
        (_shapes((1, 2, 16, 1, 8, 1)), "the chain has 1 factors"),
        (_shapes((2, 1, 16, 1, 8, 1), (2, 1, 8, 1, 16, 1)), "is no Monarch matrix"),
        (_shapes((1, 2, 16, 1, 8, 1), (2, 1, 8, 1, 16, 1)), "they are on meta"),
        (_shapes((1, 2, 16, 1, 8, 1), (2, 1, 1, 8, 16, 1)), "they are on meta"),
    ],
)
def test_what_is_no_monarch_matrix_has_a_reason(factors: list[Tensor], reason: str) -> None:
    assert reason in monarch.why_not(factors, False)


@pytest.mark.parametrize(("columns", "apart", "worth"), [(16, True, False), (256, True, True), (16, False, True)])
def test_outputs_that_stand_apart_are_ordered_for_many_columns(columns: int, apart: bool, worth: bool) -> None:
    second = (2, 1, 8, 1, columns, 1) if apart else (2, 1, 1, 8, columns, 1)
    assert monarch.worth_a_copy(_shapes((1, columns // 8, 16, 1, 8, 1), second)) is worth


def test_what_is_left_to_torch_has_a_reason() -> None:
    assert "has p or q above 1" in lattice.why_not(_shapes((2, 1, 1, 8, 16, 1)), False)
    assert lattice.why_not(_shapes((8, 2, 16, 1, 8, 1)), False) == "they are on meta"


@pytest.mark.gpu
@pytest.mark.parametrize("axes", [((8, 8, 8), 1), ((16, 32), 1), ((16, 32), 8), ((32, 16), 4)])
@pytest.mark.parametrize("tokens", [1, 17, 1000])
def test_lattices_on_a_gpu_are_as_accurate_as_torch(axes: tuple[tuple[int, ...], int], tokens: int) -> None:
    check_on_gpu(KroneckerSparse.lattice(axes[0], axes[0], axes[1]), LayerSizes(512, 512), tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("rematerialise", [False, True])
@pytest.mark.parametrize("blocks", [4, 16])
@pytest.mark.parametrize("tokens", [1, 17, 64, 1000])
def test_the_op_on_a_gpu_is_as_accurate_as_torch(strided: bool, rematerialise: bool, blocks: int, tokens: int) -> None:
    structure = Monarch(
        blocks_in=blocks,
        blocks_out=blocks,
        block_rank=128 // blocks,
        strided=strided,
        rematerialise=rematerialise,
    )
    check_on_gpu(structure, LayerSizes(512, 1024), tokens)


def check_on_gpu(structure: Chain, sizes: LayerSizes, tokens: int) -> None:
    """The op's products are generated, and as accurate as the reference."""
    made = structure.initial(sizes, torch.Generator().manual_seed(0)).values()
    factors = [each.to("cuda", torch.bfloat16).requires_grad_() for each in made]
    assert not (monarch.why_not(factors, False) and lattice.why_not(factors, False))
    x = torch.randn(tokens, sizes.in_features, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(sizes.out_features, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(tokens, sizes.out_features, device="cuda", dtype=torch.bfloat16)

    def fast(x: Tensor, bias: Tensor, *factors: Tensor) -> Tensor:
        return KRONECKER(x, factors, bias, [sizes.out_features], rematerialise=structure.rematerialise)

    def slow(x: Tensor, bias: Tensor, *factors: Tensor) -> Tensor:
        return kronecker_reference(x, factors, sizes.out_features, bias)

    assert_like_eager(fast, slow, [x, bias, *factors], torch.bfloat16, upstream)


def second_derivative(device: str) -> tuple[Tensor, Tensor]:
    """Of a Monarch layer: |2 W^T W x|^2 differentiated by x, and that in float64, 8 (W^T W)^2 x."""
    sizes: list[tuple[int, ...]] = [(8, 32), (1, 2, 32, 1, 16, 1), (2, 1, 1, 16, 32, 1)]
    generator = torch.Generator().manual_seed(0)
    x, *factors = (torch.randn(size, generator=generator) for size in sizes)
    leaves = [each.to(device, torch.bfloat16).requires_grad_() for each in (x, *factors)]
    y = KRONECKER(leaves[0], leaves[1:], None, [32])
    (dx,) = torch.autograd.grad(y.float().square().sum(), leaves[0], create_graph=True)
    (found,) = torch.autograd.grad(dx.float().square().sum(), leaves[0])
    wide = [each.detach().double() for each in leaves]
    weight_t = kronecker_reference(torch.eye(32, dtype=torch.float64, device=device), wide[1:], 32, None)
    square = weight_t @ weight_t.t()
    return found, 8 * wide[0] @ square @ square


def test_what_is_differentiated_is_made_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generated products leave no trace to differentiate."""
    traced: list[bool] = []

    def noted(call: Applied) -> Products | None:
        traced.append(torch.is_grad_enabled() and any(factor.requires_grad for factor in call.factors))
        return None

    with_torch = chosen(noted, Products(aten.between, aten.finish, aten.backward))
    for name, function in with_torch._asdict().items():
        monkeypatch.setattr(KRONECKER, name, function)
    found, exact = second_derivative("cpu")
    assert traced
    assert not any(traced)
    assert (found.double() - exact).norm() <= 2**-5 * exact.norm()


@pytest.mark.gpu
def test_gradients_can_be_differentiated_on_a_gpu() -> None:
    found, exact = second_derivative("cuda")
    assert (found.double() - exact).norm() <= 2**-5 * exact.norm()

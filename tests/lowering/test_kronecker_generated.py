"""Generated products with a Monarch matrix: interpreted on a CPU against the reference, ragged layers of any blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structfly.lowering.kronecker import aten, generated
from structfly.lowering.kronecker.op import KRONECKER
from structfly.lowering.kronecker.reference import kronecker_reference
from structfly.lowering.layer_op import Applied
from structfly.patterns.monarch import Monarch
from structfly.records.layer import LayerSizes
from tests.oracle import assert_as_accurate, assert_like_eager

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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
    dtype=st.sampled_from((torch.bfloat16, torch.float16)),
)
def test_value_and_gradients_are_those_of_the_reference(
    layer: tuple[Monarch, LayerSizes], tokens: int, bias: bool, dtype: torch.dtype
) -> None:
    structure, sizes = layer
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    x, grad = random(tokens, sizes.in_features), random(tokens, sizes.out_features)
    factors = [random(*shape) for shape in structure.shapes(sizes)]
    added = random(sizes.out_features) if bias else None
    call = Applied(x, factors, [sizes.out_features], added)
    z = generated.between(call)
    made = [generated.finish(call, z), *generated.backward(grad, call, z, [True] * 3)]

    def expected(wide: torch.dtype) -> list[Tensor]:
        leaves = [each.to(wide).requires_grad_() for each in (x, *factors)]
        y = kronecker_reference(leaves[0], leaves[1:], sizes.out_features, None if added is None else added.to(wide))
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(wide))]

    eager = Applied(
        x.cpu(), [each.cpu() for each in factors], [sizes.out_features], None if added is None else added.cpu()
    )
    kept = aten.between(eager)
    theirs = [aten.finish(eager, kept), *aten.backward(grad.cpu(), eager, kept, [True] * 3)]
    assert z[0].shape == kept[0].shape
    for mine, same, exact, what in zip(made, theirs, expected(torch.float64), ("y", "dx", "dw1", "dw2"), strict=True):
        assert mine is not None
        assert same is not None
        assert_as_accurate(mine.cpu(), same.reshape(exact.shape), exact.cpu(), dtype, what)


@given(wanted=st.lists(st.booleans(), min_size=3, max_size=3))
@settings(max_examples=8, deadline=None)
def test_what_is_not_asked_for_is_not_made(wanted: list[bool]) -> None:
    factors = [torch.ones(1, 2, 16, 1, 8, 1, dtype=torch.bfloat16), torch.ones(2, 1, 1, 8, 16, 1, dtype=torch.bfloat16)]
    call = Applied(torch.ones(3, 16, dtype=torch.bfloat16, device=DEVICE), [f.to(DEVICE) for f in factors], [16])
    made = generated.backward(call.x, call, generated.between(call), wanted)
    assert [each is not None for each in made] == wanted


def _shapes(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]


@pytest.mark.parametrize(
    ("factors", "reason"),
    [
        (_shapes((1, 2, 16, 1, 8, 1)), "the chain has 1 factors"),
        (_shapes((2, 1, 16, 1, 8, 1), (2, 1, 8, 1, 16, 1)), "is no Monarch matrix"),
        (_shapes((1, 2, 16, 1, 8, 1), (2, 1, 8, 1, 16, 1)), "they are on meta"),
    ],
)
def test_what_is_left_to_torch_has_a_reason(factors: list[Tensor], reason: str) -> None:
    assert reason in generated.why_not(factors)


@pytest.mark.gpu
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("rematerialise", [False, True])
@pytest.mark.parametrize("blocks", [4, 16])
@pytest.mark.parametrize("tokens", [1, 17, 64, 1000])
def test_the_op_on_a_gpu_is_as_accurate_as_torch(strided: bool, rematerialise: bool, blocks: int, tokens: int) -> None:
    sizes = LayerSizes(512, 1024)
    structure = Monarch(blocks_in=blocks, blocks_out=blocks, block_rank=128 // blocks, strided=strided)
    made = structure.initial(sizes, torch.Generator().manual_seed(0)).values()
    factors = [each.to("cuda", torch.bfloat16).requires_grad_() for each in made]
    assert not generated.why_not(factors)
    x = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(tokens, 1024, device="cuda", dtype=torch.bfloat16)

    def fast(x: Tensor, bias: Tensor, *factors: Tensor) -> Tensor:
        return KRONECKER(x, factors, bias, [1024], rematerialise=rematerialise)

    def slow(x: Tensor, bias: Tensor, *factors: Tensor) -> Tensor:
        return kronecker_reference(x, factors, 1024, bias)

    assert_like_eager(fast, slow, [x, bias, *factors], torch.bfloat16, upstream)

"""Generated products with BLAST weights against the specification: interpreted on a CPU, for real on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structfly.lowering.blast import generated
from structfly.lowering.blast.mixing import MOST_BLOCKS
from structfly.lowering.blast.op import BLAST
from structfly.lowering.blast.reference import blast_reference
from structfly.lowering.block_products import chunks
from structfly.lowering.block_products.chunks import Step
from structfly.lowering.layer_op import Applied
from tests.oracle import assert_as_accurate, assert_like_eager

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EIGHTS = st.integers(1, 3).map(lambda eights: 8 * eights)
NAMES = ("x", "right", "scale", "left")


def layer(
    blocks: tuple[int, int], sides: tuple[int, int], rank: int, less: tuple[int, int], dtype: torch.dtype, tokens: int
) -> Applied:
    """Blocks of the outputs and the inputs with such sides; the last ones are short of so many features."""
    (rows, columns), (outer, inner) = blocks, sides
    generator = torch.Generator().manual_seed(0)
    out_features = rows * outer - less[0]
    shapes = [
        (tokens, columns * inner - less[1]),
        (columns, rank, inner),
        (rank, rows, columns),
        (rows, outer, rank),
        (out_features,),
    ]
    x, *factors, bias = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes)
    return Applied(x, factors, [out_features], bias)


def by_reference(call: Applied, upstream: Tensor, wide: torch.dtype) -> list[Tensor]:
    """y and the gradients in a wide dtype."""
    leaves = [each.to(wide).requires_grad_() for each in (call.x, *call.factors)]
    assert call.bias is not None
    x, right, scale, left = leaves
    y = blast_reference(x, right, scale, left, call.bias.to(wide), call.static[0])
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(wide))]


@settings(max_examples=8, deadline=None)
@given(
    tokens=st.one_of(st.integers(1, 64), st.integers(65, 200)),
    blocks=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    sides=st.tuples(EIGHTS, EIGHTS),
    rank=EIGHTS,
    less=st.tuples(st.integers(0, 7), st.integers(0, 7)),
    dtype=st.sampled_from((torch.bfloat16, torch.float16)),
)
def test_value_and_gradients_are_those_of_the_reference(
    tokens: int,
    blocks: tuple[int, int],
    sides: tuple[int, int],
    rank: int,
    less: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    check(layer(blocks, sides, rank, less, dtype, tokens))


@pytest.mark.parametrize("blocks", [(17, 3), (2, 40)])
def test_more_blocks_than_tensor_cores_take_at_once(blocks: tuple[int, int]) -> None:
    check(layer(blocks, (8, 8), 8, (0, 0), torch.bfloat16, 20))


def check(call: Applied) -> None:
    """Value and gradients are as accurate as eager."""
    dtype = call.x.dtype
    upstream = torch.randn(len(call.x), call.static[0], generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    made = [generated.forward(call), *generated.backward(upstream, call, [True] * 4)]
    eager, exact = (by_reference(call, upstream, wide) for wide in (torch.float32, torch.float64))
    for mine, single, reference, what in zip(made, eager, exact, ("y", *NAMES), strict=True):
        assert mine is not None
        assert_as_accurate(mine, single.to(dtype), reference, dtype, what)


@pytest.mark.parametrize("wanted", range(16))
def test_what_is_not_asked_for_is_not_made(wanted: int) -> None:
    call = layer((2, 3), (8, 16), 8, (1, 2), torch.bfloat16, 20)
    upstream = torch.randn(20, call.static[0], generator=torch.Generator().manual_seed(1)).to(call.x)
    asked = [bool(wanted >> bit & 1) for bit in range(4)]
    every = generated.backward(upstream, call, [True] * 4)
    for made, full, ask in zip(generated.backward(upstream, call, asked), every, asked, strict=True):
        assert (made is not None) == ask
        assert made is None or (full is not None and torch.equal(made, full))


def test_sums_over_chunks_have_the_same_bits_every_time() -> None:
    call = layer((2, 2), (8, 8), 8, (0, 0), torch.bfloat16, 300)
    upstream = torch.randn(300, call.static[0], generator=torch.Generator().manual_seed(1)).to(call.x)
    for one, other in zip(*(generated.backward(upstream, call, [True] * 4) for _ in range(2)), strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


def test_chunks_are_held_in_rows_of_dx_that_are_not_made_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    call = layer((2, 2), (64, 64), 8, (0, 1), torch.bfloat16, 700)
    row_bytes = 2 * 2 * 2 * 8
    monkeypatch.setattr(chunks, "_cache_bytes", lambda _: 512 * row_bytes * 3 / 2)
    dx = call.x.new_empty(700, 2, 64)
    one, two = generated._places(call, dx, 2)
    start = (one.held.data_ptr() - dx.data_ptr()) // dx.element_size()
    assert (one.first, one.last, two.first, two.last) == (0, 384, 384, 700)
    assert (one.held.shape[3], two.held.shape[3]) == (384, 256)
    assert start >= one.last * 2 * 64
    assert start + one.held.numel() == dx.numel()
    check(call)


@pytest.mark.parametrize(
    ("out_features", "tokens_of_chunks"),
    [(4096, [1024, 384]), (16384, [1024]), (1024, [1024])],
    ids=["held in dx", "all fits", "nothing fits"],
)
def test_backward_takes_less_than_the_gradient_of_the_dense_weight_where_it_can(
    out_features: int, tokens_of_chunks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "_cache_bytes", lambda _: 50 * 2**20)  # an H100's
    factors = _factors(16, 16, 512, 256, out_features // 16)
    call = Applied(factors[0].new_empty(16384, 4096), factors, [out_features])
    places = generated._places(call, call.x.view(-1, 16, 256), 2)
    assert [place.held.shape[3] for place in places] == tokens_of_chunks
    assert [place.last for place in places] == [place.first for place in places[1:]] + [16384]
    taken = 2 * places[-1].held.numel() + 4 * sum(factor.numel() for factor in factors)
    assert (taken < 2 * 4096 * out_features) == (out_features >= 4096)


def test_without_tokens_there_is_nothing_to_make() -> None:
    call = layer((2, 3), (8, 16), 8, (1, 2), torch.bfloat16, 0)
    assert generated.forward(call).shape == (0, call.static[0])
    made = generated.backward(call.x.new_zeros(0, call.static[0]), call, [True] * 4)
    for each, like in zip(made, (call.x, *call.factors), strict=True):
        assert each is not None
        assert each.shape == like.shape
        assert not each.any()


@pytest.mark.parametrize("tokens", [3, 150])
def test_the_op_takes_them_where_nothing_is_kept(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generated, "why_no_products", lambda *_: "")
    call = layer((2, 3), (8, 16), 8, (1, 2), torch.bfloat16, tokens)
    runs: list[str] = []
    for name in ("_components", "_features"):
        monkeypatch.setattr(generated, name, _seen(getattr(generated, name), runs))

    def fast(x: Tensor, right: Tensor, scale: Tensor, left: Tensor, bias: Tensor) -> Tensor:
        return BLAST(x, [right, scale, left], bias, call.static, rematerialise=True)

    def slow(x: Tensor, right: Tensor, scale: Tensor, left: Tensor, bias: Tensor) -> Tensor:
        return blast_reference(x, right, scale, left, bias, call.static[0])

    assert call.bias is not None
    leaves = [each.requires_grad_() for each in (call.x, *call.factors, call.bias)]
    upstream = torch.randn(tokens, call.static[0], generator=torch.Generator().manual_seed(1)).to(call.x)
    assert_like_eager(fast, slow, leaves, torch.bfloat16, upstream)
    assert len(runs) == 5  # of two products forward, and two and one backward
    BLAST(leaves[0], leaves[1:4], leaves[4], call.static).backward(upstream)
    assert len(runs) == 5


def _seen(function: Callable[..., Step], runs: list[str]) -> Callable[..., Step]:
    def call(*arguments: Any, **named: Any) -> Step:
        runs.append(function.__name__)
        return function(*arguments, **named)

    return call


def _factors(rows: int, columns: int, rank: int, inner: int, outer: int) -> Sequence[Tensor]:
    shapes = [(columns, rank, inner), (rank, rows, columns), (rows, outer, rank)]
    return [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]


def test_what_is_left_to_torch_has_a_reason() -> None:
    assert generated.why_not(_factors(2, MOST_BLOCKS, 8, 8, 8)) == "they are on meta"
    assert f"there are {MOST_BLOCKS + 1} blocks along a side" in generated.why_not(
        _factors(MOST_BLOCKS + 1, 2, 8, 8, 8)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", [(4, 4), (16, 8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 17, 64, 1000, 5000])
def test_the_op_on_a_gpu_is_as_accurate_as_torch(tokens: int, dtype: torch.dtype, blocks: tuple[int, int]) -> None:
    call = layer(blocks, (128, 64), 128, (3, 1), dtype, tokens)
    assert generated.why_not(call.factors) == ""
    check(call)


@pytest.mark.gpu
@pytest.mark.parametrize(("rank", "inner", "outer"), [(12, 8, 8), (8, 12, 8), (8, 8, 12)])
def test_sides_without_descriptors_are_left_to_torch(rank: int, inner: int, outer: int) -> None:
    factors = [torch.empty_like(each, device="cuda") for each in _factors(2, 2, rank, inner, outer)]
    assert "no multiples of 16 bytes" in generated.why_not(factors)

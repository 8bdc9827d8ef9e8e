"""Generated products with BLAST weights against the specification: interpreted on a CPU, for real on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structfly import StructuredLinear, measure
from structfly.lowering.blast import generated, mixing, runs
from structfly.lowering.blast.mixing import MOST_BLOCKS
from structfly.lowering.blast.op import BLAST
from structfly.lowering.blast.reference import blast_reference
from structfly.lowering.block_products import chunks
from structfly.lowering.block_products.chunks import Step
from structfly.lowering.launch import Launch
from structfly.lowering.layer_products import Applied
from structfly.lowering.replay.recording import Recording
from structfly.patterns.blast import Blast
from tests.lowering.block_products.test_products import DEVICE, DTYPES, roundings
from tests.lowering.replay.conftest import replays  # noqa: F401 - a fixture
from tests.memory import MostAtOnce
from tests.oracle import assert_as_accurate, assert_like_eager

EIGHTS = st.integers(1, 3).map(lambda eights: 8 * eights)
NAMES = ("x", "right", "scale", "left")
EVERY = [True] * 4
SEVERAL = [(64, True), (32, True), (16, False)]


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
    with torch.autograd.set_multithreading_enabled(False):  # cuBLAS warns in a thread that it is first to use a GPU in
        return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(wide))]


def upstream_of(call: Applied) -> Tensor:
    return torch.randn(len(call.x), call.static[0], generator=torch.Generator().manual_seed(1)).to(call.x)


def kept(call: Applied, wanted: Sequence[bool]) -> list[Tensor | None]:
    """y and the gradients, with z kept."""
    z = generated.between(call)
    before = z[0].clone()
    made = [generated.finish(call, z), *generated.backward(upstream_of(call), call, z, wanted)]
    assert torch.equal(z[0], before)
    return made


def in_chunks(call: Applied, wanted: Sequence[bool]) -> list[Tensor | None]:
    return [generated.forward_in_chunks(call), *generated.backward_in_chunks(upstream_of(call), call, wanted)]


WAYS = (kept, in_chunks)


@pytest.fixture(autouse=True)
def _small_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the interpreter has several in little time."""
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(chunks, "_WHOLE", 16)
        monkeypatch.setattr(chunks, "_LEAST", 16)
        monkeypatch.setattr(runs, "_LARGEST", 64)
        monkeypatch.setattr(runs, "_SMALLEST", 16)
        monkeypatch.setattr(mixing, "TILE", 32)


@settings(max_examples=8, deadline=None)
@given(
    tokens=st.one_of(st.integers(1, 64), st.integers(65, 140)),
    blocks=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    sides=st.tuples(EIGHTS, EIGHTS),
    rank=EIGHTS,
    less=st.tuples(st.integers(0, 7), st.integers(0, 7)),
    dtype=st.sampled_from(DTYPES),
    wanted=st.one_of(st.just(EVERY), st.lists(st.booleans(), min_size=4, max_size=4)),
)
def test_value_and_gradients_are_those_of_the_reference(
    tokens: int,
    blocks: tuple[int, int],
    sides: tuple[int, int],
    rank: int,
    less: tuple[int, int],
    dtype: torch.dtype,
    wanted: list[bool],
) -> None:
    check(layer(blocks, sides, rank, less, dtype, tokens), wanted)


@pytest.mark.parametrize("blocks", [(17, 3), (2, 40)])
def test_more_blocks_than_tensor_cores_take_at_once(blocks: tuple[int, int]) -> None:
    check(layer(blocks, (8, 8), 8, (0, 0), torch.bfloat16, 20))


def test_chunks_of_several_sizes() -> None:
    check(layer((2, 2), (8, 8), 8, (0, 0), torch.bfloat16, 210))


def check(call: Applied, wanted: Sequence[bool] = EVERY) -> None:
    """Value and gradients are as accurate as eager, whether z is kept or not."""
    dtype = call.x.dtype
    eager, exact = (by_reference(call, upstream_of(call), wide) for wide in (torch.float32, torch.float64))
    for way in WAYS:
        made = way(call, wanted)
        for mine, single, reference, what, want in zip(made, eager, exact, ("y", *NAMES), (True, *wanted), strict=True):
            assert (mine is not None) == want
            if mine is not None:
                assert_as_accurate(mine, single.to(dtype), reference, dtype, what, roundings(dtype))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wanted", range(16))
def test_what_is_not_asked_for_is_not_made(wanted: int, way: Callable[..., list[Tensor | None]]) -> None:
    call = layer((2, 3), (8, 16), 8, (1, 2), torch.bfloat16, 20)
    asked = [bool(wanted >> bit & 1) for bit in range(4)]
    _, *every = way(call, EVERY)
    for made, full, ask in zip(way(call, asked)[1:], every, asked, strict=True):
        assert (made is not None) == ask
        assert made is None or (full is not None and torch.equal(made, full))


@pytest.mark.parametrize("way", WAYS)
def test_the_same_bits_every_time(way: Callable[..., list[Tensor | None]]) -> None:
    call = layer((2, 2), (8, 8), 8, (0, 0), torch.bfloat16, 210)
    assert [(run.width, run.within) for run in generated.backward_runs(call, EVERY)] == SEVERAL
    for one, other in zip(*(way(call, EVERY) for _ in range(2)), strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


@pytest.mark.parametrize("way", WAYS)
def test_without_tokens_there_is_nothing_to_make(way: Callable[..., list[Tensor | None]]) -> None:
    call = layer((2, 3), (8, 16), 8, (1, 2), torch.bfloat16, 0)
    y, *made = way(call, EVERY)
    assert y is not None
    assert y.shape == (0, call.static[0])
    for each, like in zip(made, (call.x, *call.factors), strict=True):
        assert each is not None
        assert each.shape == like.shape
        assert not each.any()


@pytest.mark.parametrize("rematerialise", [False, True])
@pytest.mark.parametrize("tokens", [3, 150])
def test_the_op_takes_them(tokens: int, rematerialise: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generated, "why_no_products", lambda *_: "")
    call = layer((2, 3), (8, 16), 8, (1, 2), torch.bfloat16, tokens)
    made: list[str] = []
    for name in ("_components", "_features", "mixing", "mixing_with_gradients", "_added"):
        monkeypatch.setattr(generated, name, _seen(getattr(generated, name), made))

    def fast(x: Tensor, right: Tensor, scale: Tensor, left: Tensor, bias: Tensor) -> Tensor:
        return BLAST(x, [right, scale, left], bias, call.static, rematerialise=rematerialise)

    def slow(x: Tensor, right: Tensor, scale: Tensor, left: Tensor, bias: Tensor) -> Tensor:
        return blast_reference(x, right, scale, left, bias, call.static[0])

    assert call.bias is not None
    leaves = [each.requires_grad_() for each in (call.x, *call.factors, call.bias)]
    assert_like_eager(fast, slow, leaves, torch.bfloat16, upstream_of(call))
    forward = ["_components", "mixing", "_features"]
    backward = ["_components", "mixing_with_gradients", "_features", "_added", "_added"]
    if rematerialise:
        backward = ["_components", *backward] * len(generated.backward_runs(call, EVERY))
    assert made == [*forward, *backward]


def test_chunks_within_dx_are_replayed(replays: list[Recording], monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(generated, "why_no_products", lambda *_: "")
    for seed in range(4):
        call = layer((2, 3), (8, 16), 8, (1, 2), torch.bfloat16, 70)
        leaves = [each.requires_grad_() for each in (call.x, *call.factors)]
        with torch.no_grad():
            call.x.add_(seed)
        y = BLAST(leaves[0], leaves[1:], None, call.static, rematerialise=True)
        made = torch.autograd.grad(y, leaves, upstream_of(call))
        plain = call._replace(x=call.x.detach(), factors=[each.detach() for each in call.factors])
        expected = generated.backward_in_chunks(upstream_of(call), plain, EVERY)
        for mine, called in zip(made, expected, strict=True):
            assert called is not None
            assert torch.equal(mine, called.view(mine.shape))
    assert [run.within for run in generated.backward_runs(call, EVERY)] == [True, False]
    assert len(replays) == 4  # two forwards, two backwards


@pytest.mark.parametrize("rematerialise", [False, True])
def test_gradients_of_gradients_are_by_torch(rematerialise: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generated, "why_no_products", lambda *_: "")
    call = layer((2, 3), (8, 16), 8, (0, 0), torch.bfloat16, 5)
    leaves = [each.requires_grad_() for each in (call.x, *call.factors)]

    def twice(y: Tensor) -> tuple[Tensor, ...]:
        (of_x,) = torch.autograd.grad((y * upstream_of(call)).sum(), leaves[:1], create_graph=True)
        return torch.autograd.grad(of_x.float().square().sum(), leaves[1:])

    def slow(x: Tensor, right: Tensor, scale: Tensor, left: Tensor) -> Tensor:
        return blast_reference(x, right, scale, left, None, call.static[0])

    mine = twice(BLAST(leaves[0], leaves[1:], None, call.static, rematerialise=rematerialise))
    theirs = twice(slow(*leaves))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02 * other.abs().max().item())


def _sized(out_features: int, rank: int) -> Applied:
    factors = _factors(16, 16, rank, 256, out_features // 16)
    return Applied(factors[0].new_empty(16384, 4096), factors, [out_features])


SIZED = {  # out_features, rank, tokens of forward's chunks, and those of backward's within dx and beside it
    "square": (4096, 512, 8192, {2048: 4, 1024: 4, 512: 4}, {384: 6}),
    "wide": (16384, 512, 16384, {}, {2432: 7}),
    "the sums alone are more": (4096, 1024, 4096, {1024: 8, 512: 8}, {256: 16}),
}


@pytest.mark.parametrize("name", SIZED)
def test_chunks_take_no_more_than_the_gradients_of_the_dense_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # chunks as GPUs have them
    out_features, rank, forward, within, beside = SIZED[name]
    call = _sized(out_features, rank)
    assert generated.forward_tokens(call) == forward
    found: dict[bool, dict[int, int]] = {True: {}, False: {}}
    for run in generated.backward_runs(call, EVERY):
        found[run.within][run.width] = -(-(run.stop - run.start) // run.width)
    assert (found[True], found[False]) == (within, beside)
    of_weight, of_x = 2 * 4096 * out_features, 2 * 4096 * 16384
    assert 2 * 16 * rank * forward <= of_weight + of_x
    sums = 4 * sum(factor.numel() for factor in call.factors)
    assert (2 * 2 * 16 * rank * max(beside) + sums <= of_weight) == (sums < of_weight)
    (without,) = generated.backward_runs(call, [False, *EVERY[1:]])
    assert without.width >= max(beside)


@settings(max_examples=200, deadline=None)
@given(
    tokens=st.integers(0, 20000),
    width=st.integers(1, 100),
    held=st.integers(0, 1000),
    alone=st.integers(8, 3000),
)
def test_chunks_within_dx_end_where_what_is_held_of_them_begins(tokens: int, width: int, held: int, alone: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "_LARGEST", 2048)
        patch.setattr(runs, "_SMALLEST", 128)
        made = list(runs.runs_within(tokens, width, held, lambda rest: min(rest, alone)))
    starts = [0, *(run.stop for run in made)]
    assert [run.start for run in made] == starts[:-1]
    assert starts[-1] == tokens
    for run in made:
        if run.within:
            assert run.width in (128, 256, 512, 1024, 2048)
            assert run.width > alone
            assert (run.stop - run.start) % run.width == 0
            assert run.stop * width <= tokens * width - run.width * held  # of the last chunk, which has least room
        else:
            assert run.width == min(alone, tokens - run.start)
            assert run.stop == tokens
    assert len({run.width for run in made}) == len(made)
    assert sum(-(-(run.stop - run.start) // run.width) for run in made) <= -(-tokens // alone)


@pytest.mark.parametrize("name", SIZED)
@pytest.mark.parametrize("for_x", [False, True])
def test_components_of_a_backward_that_kept_nothing_take_no_more_than_the_last_chunks(
    name: str, for_x: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside dx and the factors' gradients in float32."""
    monkeypatch.undo()
    monkeypatch.setattr(Launch, "__call__", lambda *_: None)
    out_features, rank, _, _, beside = SIZED[name]
    factors = _factors(16, 16, rank, 256, out_features // 16, "cpu")
    call = Applied(factors[0].new_empty(16384, 4096), factors, [out_features])
    wanted = [for_x, *EVERY[1:]]
    (alone,) = [run.width for run in generated.backward_runs(call, wanted) if not run.within]
    held = 2 * 2 * 16 * rank * alone
    numbers, of_scale = sum(factor.numel() for factor in factors), factors[1].numel()
    dx = 2 * 16384 * 4096 * for_x
    grad = call.x.new_empty(16384, out_features)
    with MostAtOnce() as seen:
        generated.backward_in_chunks(grad, call, wanted)
    # The scale's in ranges, their sum and what that is rounded to; all else rounded where what was held was.
    assert seen.bytes <= dx + 4 * numbers + max(held, 2 * numbers) + 16 * of_scale
    assert not for_x or alone == max(beside)


def _seen(function: Callable[..., Step], made: list[str]) -> Callable[..., Step]:
    def call(*arguments: Any, **named: Any) -> Step:
        made.append(function.__name__)
        return function(*arguments, **named)

    return call


def _factors(rows: int, columns: int, rank: int, inner: int, outer: int, device: str = "meta") -> Sequence[Tensor]:
    shapes = [(columns, rank, inner), (rank, rows, columns), (rows, outer, rank)]
    return [torch.empty(shape, dtype=torch.bfloat16, device=device) for shape in shapes]


def test_what_is_left_to_torch_has_a_reason() -> None:
    assert generated.why_not(_factors(2, MOST_BLOCKS, 8, 8, 8), False) == "they are on meta"
    assert f"there are {MOST_BLOCKS + 1} blocks along a side" in generated.why_not(
        _factors(MOST_BLOCKS + 1, 2, 8, 8, 8), False
    )


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", [(4, 4), (16, 8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 17, 64, 1000, 5000])
def test_the_op_on_a_gpu_is_as_accurate_as_torch(tokens: int, dtype: torch.dtype, blocks: tuple[int, int]) -> None:
    call = layer(blocks, (128, 64), 128, (3, 1), dtype, tokens)
    assert generated.why_not(call.factors, False) == ""
    check(call)


@pytest.mark.gpu
@pytest.mark.parametrize(("rank", "inner", "outer"), [(12, 8, 8), (8, 12, 8), (8, 8, 12)])
def test_sides_without_descriptors_are_left_to_torch(rank: int, inner: int, outer: int) -> None:
    factors = [torch.empty_like(each, device="cuda") for each in _factors(2, 2, rank, inner, outer)]
    assert "no multiples of 16 bytes" in generated.why_not(factors, False)


@pytest.mark.gpu
def test_memory_of_layers_that_keep_nothing_is_below_the_dense_ones() -> None:
    structure = Blast(rank=64, row_blocks=8, column_blocks=8, rematerialise=True)
    x = torch.randn(4096, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(4096, 1024, device="cuda", dtype=torch.bfloat16)
    peaks = []
    for made in (StructuredLinear(structure, 1024, 1024, bias=False), torch.nn.Linear(1024, 1024, bias=False)):
        made.to("cuda", torch.bfloat16)
        leaves = [x, *made.parameters()]

        def step(made: torch.nn.Module = made, leaves: list[Tensor] = leaves) -> object:
            return torch.autograd.grad(made(x), leaves, upstream)

        peaks.append(measure.peak_extra_memory(step, "cuda", warmups=3))
    assert peaks[0] < peaks[1]

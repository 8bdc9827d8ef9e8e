"""A GBLR layer's backward that kept nothing, in dx's memory: interpreted on a CPU against the specification."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structfly import StructuredLinear, measure
from structfly.lowering.block_products import gradients
from structfly.lowering.gblr import generated, in_place
from structfly.lowering.gblr.op import GBLR
from structfly.lowering.gblr.reference import gblr_reference
from structfly.lowering.launch import Launch
from structfly.lowering.layer_products import Applied
from structfly.lowering.replay.recording import Recording
from structfly.patterns import gblr
from tests.lowering.block_products.test_products import DEVICE, DTYPES, random, roundings
from tests.lowering.replay.conftest import replays  # noqa: F401 - a fixture
from tests.lowering.test_gblr import index
from tests.memory import MostAtOnce
from tests.oracle import assert_like_eager

WHOLE = 8


@pytest.fixture(autouse=True)
def _generated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPUs, too, in small pieces."""
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(generated, "why_no_products", lambda *_: "")
        monkeypatch.setattr(in_place, "_WHOLE", WHOLE)


class Layer(NamedTuple):
    """A layer's factors, and what it is applied to."""

    tokens: int
    in_features: int
    out_features: int
    tile: int
    group: int
    of_right: Tensor
    of_left: Tensor
    order: Tensor

    def factors(self, right: Tensor, left: Tensor) -> list[Tensor]:
        return [right, self.of_right, left, self.of_left, self.order]

    def leaves(self, dtype: torch.dtype) -> list[Tensor]:
        """x, the tiles and a bias."""
        sides = self.tile, self.group
        shapes = [
            (self.tokens, self.in_features),
            (self.of_right.shape[1], *sides),
            (self.of_left.shape[1], *sides),
            (self.out_features,),
        ]
        return [random(dtype, seed, *shape) for seed, shape in enumerate(shapes)]

    def call(self, dtype: torch.dtype) -> tuple[Tensor, Applied]:
        """A gradient, and what the op is applied to."""
        x, right, left, _ = self.leaves(dtype)
        grad = random(dtype, 4, self.tokens, self.out_features)
        return grad, Applied(x, self.factors(right, left), [self.out_features])


def layer(tokens: int, groups: int = 2) -> Layer:
    """64 features to 48, each group of 8 components seeing one tile of the inputs and two of the outputs."""
    number = torch.arange(groups)
    of_right = torch.stack((number, number % 4))
    of_left = torch.stack((number.repeat(2), torch.cat((number % 3, (number + 1) % 3))))
    order = torch.randperm(8 * groups, generator=torch.Generator().manual_seed(0))
    indices = [each.to(DEVICE, torch.int32) for each in (of_right, of_left, order)]
    return Layer(tokens, 64, 48, 16, 8, *indices)


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    """From few components to more than there are features."""
    eights = st.integers(1, 3).map(lambda eights: 8 * eights)
    tile, group, groups = draw(eights), draw(eights), draw(st.integers(1, 3))
    features = in_features, out_features = draw(st.integers(1, 100)), draw(st.integers(1, 40))
    of_right, of_left = (index(draw, groups, -(-side // tile)).to(DEVICE) for side in features)
    order = torch.tensor(draw(st.permutations(range(groups * group))), dtype=torch.int32, device=DEVICE)
    return Layer(draw(st.integers(1, 50)), in_features, out_features, tile, group, of_right, of_left, order)


@settings(max_examples=15, deadline=None)
@given(
    case=layers(),
    wanted=st.lists(st.booleans(), min_size=4, max_size=4),
    room=st.sampled_from((0, 100, 10**6)),
    dtype=st.sampled_from(DTYPES),
)
def test_gradients_are_those_of_the_reference(case: Layer, wanted: list[bool], room: int, dtype: torch.dtype) -> None:
    arguments = [leaf.requires_grad_(want) for leaf, want in zip(case.leaves(dtype), wanted, strict=True)]

    def op(x: Tensor, right: Tensor, left: Tensor, bias: Tensor) -> Tensor:
        return GBLR(x, case.factors(right, left), bias, [case.out_features], rematerialise=True)

    def reference(x: Tensor, right: Tensor, left: Tensor, bias: Tensor) -> Tensor:
        placed = (right, case.of_right, left, case.of_left, case.order)
        return gblr_reference(x, *placed, bias, case.out_features)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_place, "room_of_copies", lambda _: room)
        upstream = random(dtype, 5, case.tokens, case.out_features)
        assert_like_eager(op, reference, arguments, dtype, upstream, roundings(dtype))


@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=3)))
@pytest.mark.parametrize("room", [0, 10**6])
def test_only_gradients_that_are_wanted_are_made_with_the_same_bits(wanted: tuple[bool, ...], room: int) -> None:
    grad, call = layer(50).call(torch.bfloat16)
    of_x, of_right, of_left = wanted
    asked = [of_x, of_right, False, of_left, False, False]
    expected = GBLR.backward(grad, call, GBLR.between(call), asked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_place, "room_of_copies", lambda _: room)
        made = in_place.backward(grad, call, asked)
    for mine, kept, want in zip(made, expected, asked, strict=True):
        assert (mine is not None) == want
        assert mine is None or (kept is not None and torch.equal(mine, kept))


def taken(grad: Tensor, call: Applied, wanted: Sequence[bool], monkeypatch: pytest.MonkeyPatch) -> int:
    """The most bytes that a backward has at once, without its kernels."""
    monkeypatch.setattr(Launch, "__call__", lambda *_: None)
    in_place.backward(grad, call, wanted)  # which finds out about the indices
    with MostAtOnce() as seen:
        in_place.backward(grad, call, wanted)
    most: int = seen.bytes
    return most


def large(tokens: int, groups: int, features: int = 4096) -> tuple[Tensor, Applied]:
    """As many features to as many, each group of 128 components seeing 8 tiles of each side; without numbers."""
    number = torch.arange(8 * groups)
    where = torch.stack((number // 8, number % (features // 128))).int()
    tiles = torch.empty(8 * groups, 128, 128, dtype=torch.bfloat16)
    order = torch.arange(128 * groups, dtype=torch.int32)
    x = tiles.new_empty(tokens, features)
    return torch.empty_like(x), Applied(x, [tiles, where, torch.empty_like(tiles), where, order], [features])


EVERY = [True, True, False, True, False, False]


@pytest.mark.parametrize(
    ("tokens", "groups", "copied"),
    [
        (4096, 4, 512 * 512),
        (16384, 8, 1024 * 4096),
        (16381, 8, 1024 * 4224),
        (16384, 16, 4096**2 - 2 * 128 * 128**2),  # moved: what is copied last is 2048 * 4096
        (16384, 30, 3840 * 15360),  # too little would be made between
    ],
)
def test_the_peak_is_what_is_given_and_a_small_copy(
    tokens: int, groups: int, copied: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_place, "_WHOLE", 128)
    if groups <= 8:
        monkeypatch.setattr(gradients, "ranges", lambda *_: 3)
    grad, call = large(tokens, groups)
    of_factors = 2 * 8 * groups * 128**2
    peak = taken(grad, call, EVERY, monkeypatch)
    assert peak <= 2 * (tokens * 4096 + of_factors + copied)
    assert peak >= 0.99 * 2 * (tokens * 4096 + of_factors + copied)
    if groups < 30:
        assert peak <= 2 * (tokens * 4096 + 4096**2)  # of the dense layer, which has the same output beside


@pytest.mark.parametrize("tokens", [1000, 4096])
@pytest.mark.parametrize("groups", [2, 3])
def test_on_a_device_of_many_programs_ranges_are_no_more_than_there_is_room_for(
    tokens: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "programs_on", lambda *_: 10_000)
    grad, call = large(tokens, groups, 1024)
    assert taken(grad, call, EVERY, monkeypatch) <= 2 * (tokens * 1024 + 1024**2)  # the dense layer's


def test_without_dx_both_between_are_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    grad, call = large(1000, 8)
    peak = taken(grad, call, [False, *EVERY[1:]], monkeypatch)
    assert peak == 2 * (1024 * 1000 + 2 * 64 * 128**2)


def test_more_components_than_features_have_a_place_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    grad, call = large(100, 36)
    peak = taken(grad, call, [True, False, False, True, False, False], monkeypatch)
    assert peak == 2 * (36 * 128 * 104 + 4096 * 100 + 8 * 36 * 128**2)


def test_without_tokens_gradients_are_zero() -> None:
    grad, call = layer(0).call(torch.bfloat16)
    made = in_place.backward(grad, call, [True, True, False, True, False, False])
    assert made[0] is not None
    assert made[0].shape == (0, 64)
    assert all(each is not None and not each.any() for each in (made[1], made[3]))


@pytest.mark.parametrize(("tokens", "room"), [(40, 0), (50, 10**6)])
def test_it_is_replayed(
    replays: list[Recording],  # noqa: F811
    tokens: int,
    room: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(in_place, "room_of_copies", lambda _: room)
    monkeypatch.setattr(gradients, "ranges", lambda *_: 2)
    case = layer(tokens)
    for seed in range(4):
        x, right, left, bias = (leaf.requires_grad_() for leaf in case.leaves(torch.bfloat16))
        with torch.no_grad():
            x += seed
        y = GBLR(x, case.factors(right, left), bias, [48], rematerialise=True)
        upstream = random(torch.bfloat16, seed, *y.shape)
        made = torch.autograd.grad(y, [x, right, left], upstream)
        call = Applied(x.detach(), case.factors(right.detach(), left.detach()), [48])
        expected = GBLR.backward(upstream, call, GBLR.between(call), [True, True, False, True, False, False])
        for mine, kept in zip(made, (expected[0], expected[1], expected[3]), strict=True):
            assert kept is not None
            assert torch.equal(mine, kept)
    assert len(replays) == 4  # two forwards, two backwards


def test_the_op_makes_it_so_where_products_are_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    _, call = layer(8).call(torch.bfloat16)
    chunks = GBLR._chunks(call)
    assert chunks is not None
    assert chunks.backward is in_place.backward
    monkeypatch.undo()
    assert GBLR._chunks(call._replace(factors=[factor.cpu() for factor in call.factors])) is None


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1000, 4096])
@pytest.mark.parametrize("groups", [2, 4])
def test_memory_of_layers_that_keep_nothing_is_below_the_dense_ones(tokens: int, groups: int) -> None:
    structure = gblr.GBLR(
        tile=128, group=128, groups=groups, right_tiles=4 * groups, left_tiles=8 * groups, rematerialise=True
    )
    x = torch.randn(tokens, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(tokens, 2048, device="cuda", dtype=torch.bfloat16)
    peaks = []
    for made in (StructuredLinear(structure, 1024, 2048, bias=False), torch.nn.Linear(1024, 2048, bias=False)):
        made.to("cuda", torch.bfloat16)
        leaves = [x, *made.parameters()]

        def step(made: torch.nn.Module = made, leaves: list[Tensor] = leaves) -> object:
            return torch.autograd.grad(made(x), leaves, upstream)

        peaks.append(measure.peak_extra_memory(step, "cuda", warmups=3))
    assert peaks[0] < peaks[1]

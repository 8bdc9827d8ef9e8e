"""Generated products with tile-sparse matrices against the specification: interpreted on a CPU, for real on a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from structfly.lowering.block_products import gradients
from structfly.lowering.block_products.support import padded_rows
from structfly.lowering.block_products.tiles import Cut
from structfly.lowering.gblr import generated
from structfly.lowering.gblr.op import GBLR
from structfly.lowering.gblr.reference import gblr_reference
from structfly.lowering.gblr.tile_products import dense_of
from structfly.lowering.gemm import Tiles
from tests.lowering.block_products.test_products import DEVICE, DTYPES, roundings
from tests.lowering.test_gblr import index
from tests.oracle import assert_as_accurate, assert_like_eager

EIGHTS = st.integers(1, 5).map(lambda eights: 8 * eights)


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 40),
    features=st.integers(1, 100),
    tile=EIGHTS,
    group=EIGHTS,
    groups=st.integers(1, 4),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_products_are_those_of_the_dense_matrix(
    tokens: int, features: int, tile: int, group: int, groups: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    where = data.draw(st.composite(index)(groups, -(-features // tile))).to(DEVICE)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    tiles = random(where.shape[1], tile, group)
    order = torch.randperm(groups * group, generator=generator).to(DEVICE, torch.int32)
    dense, held = random(tokens, features), random(groups * group, padded_rows(tokens))
    bias = random(features)
    components = held[:, :tokens]  # what lies beyond is never read
    made = (
        generated.collect(dense, tiles, where, order),
        generated.spread(components, tiles, where, features),
        generated.spread(components, tiles, where, features, bias),
        generated.tiles_of(dense, components, tiles, where),
    )

    def references(wide: torch.dtype) -> tuple[Tensor, ...]:
        leaf = tiles.to(wide).requires_grad_()
        matrix = dense_of(leaf, where, features, groups)
        collected = (dense.to(wide) @ matrix).t()
        of_tiles = torch.autograd.grad(collected, leaf, components.to(wide))[0]
        moved = collected.new_zeros(held.shape).index_copy(
            0, order.long(), F.pad(collected, (0, held.shape[1] - tokens))
        )
        spread = (components.to(wide).t() @ matrix.t()).detach()
        return moved.detach(), spread, spread + bias.to(wide), of_tiles

    expected = (references(wide) for wide in (torch.float32, torch.float64))
    for mine, single, exact, what in zip(made, *expected, ("collected", "spread", "with bias", "tiles"), strict=True):
        assert_as_accurate(mine, single.to(dtype), exact, dtype, what, roundings(dtype))


def test_cyclic_intervals_and_groups_without_tiles() -> None:
    where = torch.tensor([[0, 0, 2], [3, 0, 1]], dtype=torch.int32, device=DEVICE)  # group 0 wraps, group 1 is empty
    tiles = torch.randn(3, 16, 8, device=DEVICE).bfloat16()
    dense = torch.randn(5, 64, device=DEVICE).bfloat16()
    collected = generated.collect(dense, tiles, where, torch.arange(24, dtype=torch.int32, device=DEVICE))[:, :5]
    expected = (dense.double() @ dense_of(tiles, where, 64, 3).double()).t()
    assert not collected[8:16].any()
    torch.testing.assert_close(collected.double(), expected, rtol=2**-8, atol=1e-6)
    spread = generated.spread(collected, tiles, where, 64)
    assert not spread[:, 32:48].any()


def test_what_is_left_to_torch_has_a_reason() -> None:
    assert generated.why_not(torch.empty(1, 8, 8), False) == "they are on cpu"


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 17, 1000])
@pytest.mark.parametrize(("tile", "group"), [(128, 128), (64, 32), (32, 16)])
@pytest.mark.parametrize("rematerialise", [False, True])
def test_op_on_a_gpu_is_its_reference(tokens: int, tile: int, group: int, rematerialise: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    in_features, out_features, groups = 520, 776, 6
    indices = []
    for features in (in_features, out_features):
        kept = torch.rand(groups, -(-features // tile), generator=generator) < 0.5
        kept[:, 0] = True
        indices.append(kept.nonzero().t().int().contiguous().cuda())
    of_right, of_left = indices
    shapes = [
        (tokens, in_features),
        (of_right.shape[1], tile, group),
        (of_left.shape[1], tile, group),
        (out_features,),
    ]
    arguments = [
        torch.randn(shape, generator=generator).to("cuda", torch.bfloat16).requires_grad_() for shape in shapes
    ]
    assert generated.why_not(arguments[1], False) == ""

    def op(x: Tensor, right: Tensor, left: Tensor, bias: Tensor) -> Tensor:
        factors = [right, of_right, left, of_left, order]
        return GBLR(x, factors, bias, [out_features], rematerialise=rematerialise)

    def reference(x: Tensor, right: Tensor, left: Tensor, bias: Tensor) -> Tensor:
        return gblr_reference(x, right, of_right, left, of_left, order, bias, out_features)

    order = torch.randperm(groups * group, generator=generator).to("cuda", torch.int32)
    upstream = torch.randn(tokens, out_features, generator=generator).to("cuda", torch.bfloat16)
    assert_like_eager(op, reference, arguments, torch.bfloat16, upstream=upstream)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_step_does_not_wait_for_the_device() -> None:
    where = torch.tensor([[0, 0, 1], [0, 1, 1]], dtype=torch.int32, device="cuda")
    order = torch.arange(32, dtype=torch.int32, device="cuda").flip(0)
    for dtype in (torch.bfloat16, torch.float32):
        x, right, left = (
            torch.randn(shape, dtype=dtype, device="cuda", requires_grad=True)
            for shape in [(8, 32), (3, 16, 16), (3, 16, 16)]
        )

        def step(x: Tensor, right: Tensor, left: Tensor) -> None:
            GBLR(x, [right, where, left, where, order], None, [32]).sum().backward()

        step(x, right, left)
        try:
            torch.cuda.set_sync_debug_mode("error")
            step(x, right, left)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_gradients_can_be_differentiated_on_a_gpu() -> None:
    where = torch.tensor([[0, 0, 1], [0, 1, 1]], dtype=torch.int32, device="cuda")
    order = torch.arange(32, dtype=torch.int32, device="cuda").flip(0)
    x, right, left = (
        torch.randn(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        for shape in [(8, 32), (3, 16, 16), (3, 16, 16)]
    )
    y = GBLR(x, [right, where, left, where, order], None, [32])
    (dx,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
    again = torch.autograd.grad(dx.float().square().sum(), (x, right, left))
    weight = dense_of(left.double(), where, 32, 2)[:, order] @ dense_of(right.double(), where, 32, 2).t()
    # |2 W^T W x|^2 differentiated by x: 8 (W^T W)^2 x
    square = weight.t() @ weight
    exact = 8 * x.double() @ square @ square
    assert (again[0].double() - exact).norm() <= 2**-5 * exact.norm()


@pytest.mark.skipif(DEVICE == "cuda", reason="forces tiles of the interpreter; a GPU chooses its own of that kind")
def test_tiles_are_the_same_in_boxes_that_span_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    dense, held = (torch.randn(shape, generator=generator).bfloat16() for shape in ((45, 64), (3 * 48, 48)))
    tiles = torch.empty(5, 32, 48, dtype=torch.bfloat16)
    spanning = Cut(Tiles(16, 32, 16, 2, 2, 1, 1), 1.0, abreast=3, spans=True)
    made = []
    for cut in (None, spanning):
        if cut is not None:
            monkeypatch.setattr(gradients, "gradient_cut", lambda *_: spanning)
        where = torch.tensor([[0, 1, 2, 0, 2], [0, 0, 0, 1, 1]], dtype=torch.int32)
        made.append(generated.tiles_of(dense, held[:, :45], tiles, where))
    torch.testing.assert_close(made[1], made[0])

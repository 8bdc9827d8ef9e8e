"""Whatever tiles a table has: the schemes are right, take what the planner says, and both ask for the same."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from structfly.lowering.gemm import Product, Tiles
from structfly.lowering.head.epilogue import parse_epilogue
from structfly.lowering.head.linear import Wanted
from structfly.lowering.linear_cross_entropy import blocks, exponentials, row_pass, tuning
from structfly.lowering.linear_cross_entropy.exponentials import ExponentialRun
from structfly.lowering.linear_cross_entropy.row_pass import RowPass
from structfly.lowering.linear_cross_entropy.schedule import block_sizes, exponentials_bytes
from structfly.lowering.linear_cross_entropy.tiles import PRODUCTS, HeadClass, HeadTiles, head_class
from structfly.lowering.linear_cross_entropy.tuning import HeadShape, HeadTimer
from structfly.lowering.tuning.choice import INTERPRETED, SAFE
from structfly.lowering.tuning.limits import why_not
from structfly.patterns.linear_cross_entropy import menu
from structfly.records import DeviceModel
from tests.lowering.linear_cross_entropy.served import DEVICE, calls, check, check_same_bits, served
from tests.patterns.linear_cross_entropy.test_menu import H100, capped, choose, loss, stored_transposed

# numpy, which interprets the kernels, warns of the infinities and NaNs that are meant to be there.
pytestmark = pytest.mark.filterwarnings("ignore:.*(overflow|invalid value|All-NaN).*:RuntimeWarning")

LARGE = [
    Tiles(m=m, n=n, k=k, group=group, parts=2, warps=4, stages=2)
    for m, n, k, group in ((64, 64, 32, 1), (64, 128, 64, 8), (128, 64, 64, 32), (128, 128, 32, 4))
]


@st.composite
def small_tiles(draw: st.DrawFn, *, transposed: bool) -> HeadTiles:
    """Different ones for each product, in proportion to what tables may have: a sum's step along the rows is no longer
    than what the tiles before it leave whole.  On a device, such as it runs."""
    if DEVICE == "cuda":
        return HeadTiles(transposed, *(draw(st.sampled_from(LARGE)) for _ in PRODUCTS))
    sides = st.sampled_from((16, 32))
    cut = {
        name: Tiles(
            m=draw(sides),
            n=draw(st.sampled_from((32, 64))),
            k=16 if name.endswith("_sum") else draw(sides),
            group=draw(st.integers(1, 3)),
            parts=2,
            warps=1,
            stages=1,
        )
        for name in PRODUCTS
    }
    return HeadTiles(transposed, **cut)


@settings(max_examples=4)
@pytest.mark.parametrize(("scheme", "workspaces"), [("exponentials", (1500, 12000)), ("blocks", (8000, 60000))])
@given(data=st.data())
def test_any_tiles_are_as_accurate_as_the_reference(
    scheme: str, workspaces: tuple[int, int], data: st.DataObject
) -> None:
    call = data.draw(calls(scheme, st.integers(*workspaces), classes=120))
    tiles = data.draw(small_tiles(transposed=call.weight.stride(1) != 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr({"exponentials": exponentials, "blocks": blocks}[scheme], "tiles_of", lambda _: tiles)
        check(call)


@settings(max_examples=15)
@given(
    rows=st.integers(1, 90),
    eights=st.tuples(st.integers(1, 12), st.integers(1, 20)),
    length=st.integers(1, 90),
    transposed=st.booleans(),
    learned=st.booleans(),
    data=st.data(),
)
def test_exponentials_take_what_the_planner_says(
    rows: int, eights: tuple[int, int], length: int, transposed: bool, learned: bool, data: st.DataObject
) -> None:
    hidden, classes = (8 * size for size in eights)
    tiles, length = data.draw(small_tiles(transposed=transposed)), min(length, rows)
    timer = HeadTimer(HeadShape(rows, hidden, classes, transposed), torch.device(DEVICE), 2**20, tiles)
    head, wanted = timer.head, Wanted(x=True, weight=True)
    if learned:
        chain = parse_epilogue("mul:scalar0,mul:row1,add:class2")
        operands = tuple(torch.ones(shape, device=DEVICE) for shape in ((), (rows,), (classes,)))
        head = replace(head, bias=head.weight[:, 0].contiguous(), epilogue=chain, operands=operands)
        wanted = replace(wanted, bias=True, operands=(True,) * 3)
    each = RowPass(head, timer._coefficients, length, "exponentials", tiles, sums_width=hidden, wanted=wanted)
    run = ExponentialRun(each, wanted)
    kept = [each.chunk.exps, each.chunk.factor_x, each.sums, each.reference, run.hidden_sums, run.weight_sum._plane]
    kept += [each.operands.row_sums, each.operands.label, each.operands._totals] if learned else []
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    assert len(storages) == 3 + 3 * learned
    spare = 0 if tiles.losses == INTERPRETED else 2**21
    taken = sum(storages.values()) + rows * 52 + spare
    promised = exponentials_bytes(rows, length, hidden, classes, tiles, wanted=wanted, epilogue=head.epilogue)
    assert taken - 512 <= promised <= taken + 64 * length


@given(
    sizes=st.tuples(st.integers(1, 20000), st.integers(1, 400), st.integers(1, 100000)),
    limit=st.integers(0, 2**29),
    transposed=st.booleans(),
    cut=st.tuples(*(st.sampled_from(LARGE) for _ in PRODUCTS)),
)
def test_blocks_are_whole_tiles_of_every_product_within_the_limit(
    sizes: tuple[int, int, int], limit: int, transposed: bool, cut: tuple[Tiles, ...]
) -> None:
    rows, hidden, classes = sizes[0], 8 * sizes[1], sizes[2]
    tiles = HeadTiles(transposed, *cut)
    made = block_sizes(rows, hidden, classes, limit, processors=132, tiles=tiles)
    for height in (tiles.block.m, tiles.block_hidden_sum.m):
        assert made.rows % height == 0
    weight_side = tiles.block_weight_sum.n if transposed else tiles.block_weight_sum.m
    for width in (made.classes, made.beside):
        assert width % tiles.block.n == width % weight_side == 0
    if made.bytes > limit:
        assert made.rows <= 8 * tiles.block_rows
        assert made.classes <= 8 * tiles.block_classes


def test_what_blocks_do_not_need_of_the_rows_is_let_go() -> None:
    tiles = HeadTiles(False, *[INTERPRETED if DEVICE == "cpu" else SAFE] * len(PRODUCTS))
    timer = HeadTimer(HeadShape(40, 32, 48), torch.device(DEVICE), 2**20, tiles)
    each = RowPass(timer.head, timer._coefficients, 20, "rows", tiles)
    each.do_all()
    buffer = StorageWeakRef(each.chunk.factor_x.untyped_storage())
    assert not buffer.expired()
    each.release()
    gc.collect()  # the interpreter leaves cycles
    assert buffer.expired()


def test_tables_can_hold_the_tiles_that_tests_run() -> None:
    h100 = DeviceModel("NVIDIA H100", (9, 0))
    kind = head_class(h100, hidden=512, classes=32000, weight_row=512, nonlinear=True)
    for name in PRODUCTS:
        for tiles in LARGE:
            assert not why_not(getattr(kind, name).template, tiles, (9, 0))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", PRODUCTS)
def test_the_class_says_what_the_product_that_is_launched_has(
    name: str, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if DEVICE == "cpu":
        monkeypatch.setattr(tuning, "_LARGEST_SIDE", 32)
    tiles = HeadTiles(transposed, *[INTERPRETED if DEVICE == "cpu" else SAFE] * len(PRODUCTS))
    timer = HeadTimer(HeadShape(40, 16, 96, transposed), torch.device(DEVICE), 4096, tiles)
    kind = head_class(
        DeviceModel("", (9, 0)), hidden=16, classes=96, weight_row=96 if transposed else 16, nonlinear=False
    )
    launched: list[tuple[str, str]] = []
    made = Product.__init__

    def noted(self: Any, template: str, a: Tensor, b: Tensor, *rest: Any, **options: Any) -> None:
        launched.append((template, "".join("n" if side.stride(1) == 1 else "t" for side in (a, b))))
        made(self, template, a, b, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Product, "__init__", noted)
        launch = timer.launch(name, tiles)
        launch()
    product = getattr(kind, name)
    assert (product.template, product.layout) in launched


@pytest.mark.parametrize("function", [loss, capped, stored_transposed])
def test_planner_and_run_time_ask_for_the_same(
    function: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, HeadClass] = {}

    def note(who: str) -> Callable[..., HeadClass]:
        def noted(device: DeviceModel, **options: Any) -> HeadClass:
            asked[who] = head_class(H100.model, **options)
            return head_class(device, **options)

        return noted

    monkeypatch.setattr(menu, "head_class", note("planner"))
    monkeypatch.setattr(row_pass, "head_class", note("run time"))
    choose((4096, 64, 1000), function=function)
    transposed = function is stored_transposed
    epilogue = "div:3.0,tanh,mul:3.0" if function is capped else ""
    row_pass.tiles_of(head_of(4096, 64, 1000, transposed, epilogue))
    assert asked["planner"] == asked["run time"]
    assert asked["planner"].transposed == transposed
    assert asked["planner"].nonlinear == (function is capped)


def test_times_are_of_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_REPEATS", 2)
    monkeypatch.setattr(tuning, "_WARMUPS", 0)
    tiles = HeadTiles(False, *[INTERPRETED if DEVICE == "cpu" else SAFE] * len(PRODUCTS))
    timer = HeadTimer(HeadShape(16, 16, 32), torch.device(DEVICE), 4096, tiles)
    launches: list[str] = []
    monkeypatch.setattr(timer, "launch", lambda name, _: lambda: launches.append(name))
    assert timer.seconds("losses", tiles) > 0
    assert launches == ["losses"] * 2


def head_of(rows: int, hidden: int, classes: int, transposed: bool, epilogue: str) -> Any:
    """The inputs of a head as the op has them."""
    timer = HeadTimer(
        HeadShape(rows, hidden, classes, transposed, epilogue),
        torch.device(DEVICE),
        2**20,
        HeadTiles(transposed, *[SAFE] * len(PRODUCTS)),
    )
    return timer.head


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["exponentials", "blocks"])
@pytest.mark.parametrize("tiles", LARGE, ids=str)
def test_any_tiles_on_cuda(scheme: str, tiles: Tiles, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (exponentials, blocks):
        monkeypatch.setattr(module, "tiles_of", lambda _: HeadTiles(False, *[tiles] * len(PRODUCTS)))
    call = served(scheme=scheme, rows=3000, hidden=320, classes=20011, workspace=12 * 2**20, ignored=0.3)
    check(call)
    check_same_bits(call)

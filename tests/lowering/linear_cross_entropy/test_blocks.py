"""The scheme "blocks", interpreted: as accurate as eager, in as little memory as it is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structfly import measure
from structfly.errors import StructflyError
from structfly.lowering.linear_cross_entropy import blocks
from structfly.lowering.linear_cross_entropy.arguments import Arguments
from structfly.lowering.linear_cross_entropy.op import linear_cross_entropy
from structfly.lowering.linear_cross_entropy.schedule import BlockSizes, block_sizes
from structfly.lowering.linear_cross_entropy.tiles import head_class, head_tiles
from structfly.records import DeviceModel
from tests.lowering.linear_cross_entropy.cases import leaves_of, run, run_reference
from tests.lowering.linear_cross_entropy.served import (
    DEVICE,
    calls,
    check,
    check_overflow,
    check_rounding,
    check_same_bits,
    check_transposed,
    served,
)

# numpy, which interprets the kernels, warns of the infinities and NaNs that are meant to be there.
pytestmark = pytest.mark.filterwarnings("ignore:.*(overflow|invalid value|All-NaN).*:RuntimeWarning")


def block_call(**options: Any) -> Arguments:
    return served(**{"scheme": "blocks", "workspace": 9400, **options})


@settings(max_examples=10)
@given(call=calls("blocks", st.integers(8000, 30000), classes=160))
def test_as_accurate_as_the_reference(call: Arguments) -> None:
    check(call)


@pytest.mark.parametrize(
    "options",
    [
        {"classes": 500},
        {"classes": 700, "class_weight": True, "label_smoothing": 0.9},
        {"classes": 700, "cut": 5, "ignored": 0.7, "bias": True},
        {"classes": 700, "epilogue": "div:3.0,tanh,mul:3.0", "class_mask": True},
    ],
)
def test_while_the_last_classes_gradient_is_room(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of three sizes beside the hidden states in dW, and then those whose memory holds a chunk of them."""
    kinds = set()
    add = blocks.BlockRun._add

    def noted(run: Any, classes: range, length: int, x: torch.Tensor, buffer: torch.Tensor | None = None) -> None:
        if classes:
            kinds.add((length, classes.step, buffer is None))
        add(run, classes, length, x, buffer)

    monkeypatch.setattr(blocks.BlockRun, "_add", noted)
    monkeypatch.setattr(blocks, "block_sizes", lambda *sizes, **_: BlockSizes(16, 64, 32, 0))
    check(block_call(rows=50, hidden=24, **options))
    assert len(kinds) == 4


@pytest.mark.parametrize("options", [{}, {"bias": True}])
def test_gradients_are_little_more_than_rounded(options: dict[str, Any]) -> None:
    check_rounding(block_call(rows=72, hidden=32, classes=160, epilogue="mul:0.1", workspace=20000, **options))


def test_a_chain_that_takes_a_tensor_is_refused() -> None:
    with pytest.raises(StructflyError, match="its pointwise chain takes a tensor, other than masks"):
        linear_cross_entropy(*block_call(epilogue="mul:scalar0"))


@pytest.mark.parametrize("scale", [30.0, 1e3, 1e30])
def test_rows_whose_exponentials_overflow(scale: float) -> None:
    check_overflow(block_call(rows=50, classes=300), scale)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_special_values_as_eager(value: float) -> None:
    call = block_call(rows=20, classes=40, ignored=0.0)
    with torch.no_grad():
        call.x[3, 2] = value
    made, eager = (torch.autograd.grad(f(call, *leaves_of(call)), leaves_of(call)) for f in (run, run_reference))
    assert torch.equal(made[0].isnan(), eager[0].isnan())
    assert made[1].isnan().any()


def test_hidden_states_that_lie_transposed() -> None:
    check_transposed(block_call(rows=40, classes=50))


def test_same_bits_every_time() -> None:
    check_same_bits(block_call(rows=60, classes=300))


@given(
    rows=st.integers(1, 70000),
    hidden=st.integers(1, 1000).map(lambda eights: 8 * eights),
    classes=st.integers(1, 300000),
    limit=st.integers(0, 2**31),
)
def test_sizes_are_whole_tiles_within_the_limit(rows: int, hidden: int, classes: int, limit: int) -> None:
    h100 = DeviceModel("NVIDIA H100", (9, 0))
    tiles = head_tiles(head_class(h100, hidden=hidden, classes=classes, weight_row=hidden, nonlinear=False))
    sizes = block_sizes(rows, hidden, classes, limit, processors=132, tiles=tiles)
    for size, tile, whole in ((sizes.rows, tiles.block_rows, rows), (sizes.classes, tiles.block_classes, classes)):
        assert size % tile == 0
        assert 0 < size < whole + tile
    if sizes.bytes > limit:  # nothing fits: neither does a single tile
        assert (sizes.rows, sizes.classes) <= (8 * tiles.block_rows, 8 * tiles.block_classes)
    roomier = block_sizes(rows, hidden, classes, 2 * sizes.bytes, processors=132, tiles=tiles)
    assert roomier.bytes <= 2 * sizes.bytes


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"epilogue": "div:3.0,tanh,mul:3.0", "class_mask": True},
        {"class_weight": True, "reduction": "none"},
        {"row_weight": True, "cut": 3},
        {"label_smoothing": 0.1, "class_weight": True},
        {"schedule": "backward", "transposed": True, "classes": 16384},
        {"ignored": 0.9},
        {"bias": True, "cut": 3},
    ],
)
def test_all_kinds_of_blocks_on_cuda(options: dict[str, Any]) -> None:
    check(block_call(**{"rows": 3000, "hidden": 320, "classes": 20011, "workspace": 5 * 2**20, **options}))


@pytest.mark.gpu
@pytest.mark.parametrize(("mebibytes", "bias"), [(12, False), (24, True), (48, False)])
def test_memory_stays_within_the_limit_on_cuda(mebibytes: int, bias: bool) -> None:
    call = block_call(rows=8192, hidden=512, classes=50257, workspace=mebibytes * 2**20, bias=bias)
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in leaves_of(call))
    peak = measure.peak_extra_memory(lambda: linear_cross_entropy(*call), DEVICE)
    assert peak <= gradients + call.workspace

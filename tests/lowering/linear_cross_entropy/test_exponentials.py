"""The scheme "exponentials", interpreted: as accurate as eager, and right where exponentials overflow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from structfly import measure
from structfly.errors import StructflyError
from structfly.lowering.gemm import TORCH_MM, LibraryProduct
from structfly.lowering.linear_cross_entropy import exponentials as scheme
from structfly.lowering.linear_cross_entropy import row_pass, smoothing
from structfly.lowering.linear_cross_entropy.arguments import Arguments
from structfly.lowering.linear_cross_entropy.op import linear_cross_entropy
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
from tests.oracle import in_float64

# numpy, which interprets the kernels, warns of the infinities and NaNs that are meant to be there.
pytestmark = pytest.mark.filterwarnings("ignore:.*(overflow|invalid value|divide by zero|All-NaN).*:RuntimeWarning")


def exponentials(**options: Any) -> Arguments:
    return served(scheme="exponentials", **options)


@settings(max_examples=20)
@given(call=calls("exponentials", st.integers(1, 50).map(lambda rows: rows * 112 * 2)))
def test_as_accurate_as_the_reference(call: Arguments) -> None:
    check(call)


class Counted(LibraryProduct):
    """Counts its launches."""

    launches = 0

    def __call__(self, *arguments: Any) -> None:
        Counted.launches += 1
        super().__call__(*arguments)


@pytest.fixture
def torch_makes_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all rows, as a table may have it."""
    tiles_of = row_pass.tiles_of
    monkeypatch.setattr(scheme, "tiles_of", lambda head: tiles_of(head).with_one("hidden_product_of_all", TORCH_MM))
    monkeypatch.setattr(scheme, "LibraryProduct", Counted)
    Counted.launches = 0


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(call=calls("exponentials", st.integers(1, 50).map(lambda rows: rows * 112 * 2)))
def test_torchs_product_is_as_accurate(call: Arguments, torch_makes_hidden: None) -> None:
    check(call)


@pytest.mark.parametrize("options", [{}, {"ignore_index": -100}, {"reduction": "sum", "row_weight": True}])
def test_torch_makes_products_of_all_rows_only(options: dict[str, Any], torch_makes_hidden: None) -> None:
    call = exponentials(**{"rows": 50, "classes": 48, "workspace": 16 * 48 * 2, "ignore_index": None, **options})
    check(call)
    assert bool(Counted.launches) == (not options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"workspace": 32 * 160 * 2},
        {"workspace": 32 * 160 * 2, "class_weight": True},
        {"workspace": 32 * 160 * 2, "label_smoothing": 0.1},
        {"workspace": 32 * 160 * 2, "epilogue": "tanh"},
        {"workspace": 32 * 160 * 2, "bias": True},
        {"workspace": 32 * 160 * 2, "bias": True, "label_smoothing": 0.1, "class_weight": True},
        {"workspace": 32 * 160 * 2, "bias": True, "epilogue": "mul:0.1,mul:scalar0,add:class1"},
        {"workspace": 32 * 160 * 2, "bias": True, "epilogue": "mul:0.1,mul:row0,add:class1,tanh,mul:scalar2"},
    ],
)
def test_gradients_are_little_more_than_rounded(options: dict[str, Any]) -> None:
    check_rounding(exponentials(**{"rows": 72, "hidden": 32, "classes": 160, "epilogue": "mul:0.1", **options}))


@pytest.mark.parametrize("class_weight", [False, True])
def test_sums_of_label_smoothing_in_parts(class_weight: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoothing, "_UPCAST_ROWS", 16)
    check(exponentials(rows=40, classes=50, bias=True, frozen={"bias"}, label_smoothing=0.3, class_weight=class_weight))


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True])
def test_a_sum_over_classes_takes_little_memory_on_cuda(transposed: bool) -> None:
    shape = (256, 65536) if transposed else (65536, 256)
    stored = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16().to(DEVICE)
    weight = stored.t() if transposed else stored
    total, _ = smoothing.weighted_classes(weight, None, None)
    torch.testing.assert_close(total.double(), weight.double().sum(0), rtol=1e-5, atol=1e-3)
    assert measure.peak_extra_memory(lambda: smoothing.weighted_classes(weight, None, None), DEVICE) <= 2**20


@pytest.mark.parametrize("scale", [30.0, 1e3, 1e30])
@pytest.mark.parametrize("workspace", [2**20, 16 * 304 * 2])
def test_rows_whose_exponentials_overflow_are_done_again(scale: float, workspace: int) -> None:
    check_overflow(exponentials(rows=50, classes=300, workspace=workspace), scale)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_special_values_as_eager(value: float) -> None:
    call = exponentials(rows=20, classes=40, ignored=0.0, reduction="none")
    with torch.no_grad():
        call.x[3, 2] = value
    loss, eager = run(call, *leaves_of(call)), run_reference(call, *leaves_of(call))
    assert torch.equal(loss.isnan(), eager.isnan())
    torch.testing.assert_close(loss, eager, equal_nan=True, rtol=2e-2, atol=2e-2)


def test_no_loss_is_negative() -> None:
    call = exponentials(rows=60, classes=40, ignored=0.0, reduction="none")
    with torch.no_grad():
        assert call.target is not None
        call.x.copy_(20 * call.weight[call.target])  # all but certain of the target
    assert (run(call, *leaves_of(call)) >= 0).all()


def test_all_rows_ignored() -> None:
    call = exponentials(ignored=1.0, rows=40, workspace=16 * 48 * 2)
    loss = run(call, *leaves_of(call))
    gradients = torch.autograd.grad(loss, leaves_of(call))
    assert bool(loss.isnan())
    assert not any(gradient.any() for gradient in gradients)


def test_hidden_states_that_lie_transposed() -> None:
    check_transposed(exponentials(rows=40, classes=50, workspace=20 * 64 * 2))


def test_a_weight_that_begins_anywhere_in_a_buffer() -> None:
    call = exponentials(rows=40, classes=50)
    buffer = torch.empty(call.weight.numel() + 3, dtype=torch.bfloat16, device=DEVICE)
    weight = buffer[3:].view_as(call.weight).copy_(call.weight.detach()).requires_grad_()
    assert weight.data_ptr() % 16
    moved = call._replace(weight=weight)
    for a, b in zip(linear_cross_entropy(*moved)[:-1], linear_cross_entropy(*call)[:-1], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("epilogue", ["", "mul:scalar0,add:class1,sub:row2"])
def test_same_bits_every_time(epilogue: str) -> None:
    check_same_bits(exponentials(rows=60, classes=70, workspace=16 * 80 * 2, bias=True, epilogue=epilogue))


def test_without_gradients_no_exponentials_are_kept() -> None:
    call = exponentials(frozen=frozenset({"x", "weight"}), rows=30, classes=50)
    torch.testing.assert_close(
        linear_cross_entropy(*call).loss, run_reference(call, *leaves_of(call)), rtol=1e-2, atol=1e-2
    )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": torch.float32}, "only bfloat16"),
        ({"hidden": 12}, "multiple of 8"),
        ({"label_smoothing": 0.1, "epilogue": "tanh"}, "label smoothing of logits that are capped"),
        ({"label_smoothing": 0.1, "class_mask": True}, "label smoothing of logits that are capped or masked"),
        ({"rank": 2}, "sum of two products"),
        ({"statistics": "lse"}, "statistics of the rows are wanted"),
        ({"statistics": "argmax", "epilogue": "mul:0.5"}, "statistics of the rows are wanted"),
        ({"target": None, "statistics": "lse", "reduction": "none"}, "statistics of the rows are wanted"),
        ({"row_loss": "square loss", "reduction": "sum"}, "statistics of the rows are wanted"),
        ({"epilogue": "mul:class0"}, "class0 needs a gradient, and is more than added"),
        ({"epilogue": "tanh,add:class0"}, "class0 needs a gradient, and is more than added before slopes differ"),
        ({"epilogue": "mul:scalar0", "label_smoothing": 0.1}, "label smoothing of logits that are capped"),
    ],
)
def test_heads_it_does_not_serve_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(StructflyError, match=reason):
        linear_cross_entropy(*exponentials(**options))


def test_the_scale_of_rows_that_are_certain_of_their_target() -> None:
    """Its gradient is what little probability the others have times their distances from the target: no difference."""
    call = exponentials(rows=60, classes=40, ignored=0.0, epilogue="mul:scalar0", cut=0)
    with torch.no_grad():
        assert call.target is not None
        call.weight.copy_(4 * F.normalize(call.weight))
        call.x.copy_(4 * call.weight[call.target])
        call.operands[0].fill_(1.0)
    (scale,) = call.operands
    (made,) = torch.autograd.grad(run(call, *leaves_of(call)), scale)
    exact = [in_float64(leaf) for leaf in leaves_of(call)]
    (wanted,) = torch.autograd.grad(run_reference(call, *exact), exact[-1])
    assert 1e-9 < -wanted.item() < 1e-5
    assert abs(made.item() / wanted.item() - 1) <= 2.0**-8


@pytest.mark.parametrize("epilogue", ["rdiv:1.5", "div:row0,rdiv:scalar1"])
def test_slopes_of_rows_that_are_not_there_are_not_read(epilogue: str) -> None:
    call = exponentials(rows=50, classes=70, ignored=0.9, epilogue=epilogue, frozen={"operands"})
    with torch.no_grad():
        call.x.copy_(call.x.abs() + 1)
        call.weight.copy_(call.weight.abs() + 1)
    check(call)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True, "epilogue": "mul:scalar0"},
        {"bias": True, "label_smoothing": 0.1, "cut": 3},
        {"epilogue": "div:row0,add:class1,sub:row2,tanh,mul:scalar3", "class_mask": True},
        {"epilogue": "div:3.0,tanh,mul:3.0", "class_mask": True},
        {"class_weight": True, "reduction": "none"},
        {"row_weight": True, "cut": 3},
        {"label_smoothing": 0.1, "class_weight": True},
        {"schedule": "backward", "transposed": True, "classes": 4096},
        {"ignored": 0.9},
        {"hidden": 2048},  # two programs share a sum of dx
    ],
)
def test_several_chunks_on_cuda(options: dict[str, Any]) -> None:
    check(exponentials(**{"rows": 3000, "hidden": 320, "classes": 4099, "workspace": 640 * 4112 * 2, **options}))


@pytest.mark.gpu
def test_offsets_past_two_to_the_31() -> None:
    call = exponentials(rows=17000, hidden=64, classes=131072, workspace=2**33)
    chunked = call._replace(scheme="logits", workspace=2**28)
    one, other = (torch.autograd.grad(run(each, *leaves_of(each)), leaves_of(each)) for each in (call, chunked))
    for a, b in zip(one, other, strict=True):
        assert (a - b).float().norm() <= 5e-2 * b.float().norm()
    assert (one[0][-100:] - other[0][-100:]).float().norm() <= 5e-2 * other[0][-100:].float().norm()

"""The op against its reference in float64, and its contracts with torch."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.library import opcheck

from structfly.errors import StructflyError, UnsupportedError
from structfly.lowering.linear_divergence import flops, transforms
from structfly.lowering.linear_divergence.arguments import Arguments
from structfly.lowering.linear_divergence.op import linear_divergence
from structfly.lowering.linear_divergence.rows import KINDS
from tests.lowering.linear_divergence.cases import TEACHERS, calls, leaves_of, make_call, run, run_reference
from tests.oracle import assert_like_eager

OP = torch.ops.structfly.linear_divergence_v1
BACKWARD = torch.ops.structfly.linear_divergence_backward_v1
_REGISTERED = (flops, transforms)  # imported for what they register


def upstream_for(call: Arguments) -> Tensor:
    shape = call.x.shape[:1] if call.reduction == "none" else ()
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@settings(max_examples=80)
@given(call=calls())
def test_as_accurate_as_the_reference(call: Arguments) -> None:
    fast, reference = partial(run, call), partial(run_reference, call)
    # Where p is close to q the gradient is a small difference of them.
    assert_like_eager(fast, reference, leaves_of(call), call.x.dtype, upstream_for(call), roundings=64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_as_accurate_as_the_reference_at_size(dtype: torch.dtype, kind: str) -> None:
    workspace = 256 * 1008 * dtype.itemsize
    call = make_call(dtype=dtype, rows=500, hidden=64, classes=1003, kind=kind, workspace=workspace, epilogue="div:8.0")
    # The worst row is one draw: of float32's products in another order than eager's it takes more than one rounding.
    roundings = 8 if dtype == torch.float32 else 1
    assert_like_eager(partial(run, call), partial(run_reference, call), leaves_of(call), dtype, roundings=roundings)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_as_accurate_as_the_reference_on_cuda(dtype: torch.dtype, kind: str, teacher: str) -> None:
    call = make_call(
        dtype=dtype,
        rows=500,
        hidden=64,
        classes=1003,
        kind=kind,
        teacher=teacher,
        workspace=256 * 1008 * dtype.itemsize,
        device="cuda",
        epilogue="div:2.0",
        bias=teacher == "head",
    )
    fast, reference = partial(run, call), partial(run_reference, call)
    # Products in another order than eager's: in float32 that is more than one rounding.
    assert_like_eager(fast, reference, leaves_of(call), dtype, roundings=8 if dtype == torch.float32 else 1)


@settings(max_examples=30)
@given(call=calls(dtypes=(torch.float32, torch.float64)))
def test_chunk_length_does_not_change_the_loss(call: Arguments) -> None:
    whole = run(call._replace(workspace=2**30), *leaves_of(call))
    torch.testing.assert_close(run(call, *leaves_of(call)), whole, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_the_teacher_is_only_read() -> None:
    for teacher in TEACHERS[1:]:
        call = make_call(teacher=teacher, kind="jsd")
        assert call.teacher is not None
        before = call.teacher.clone()
        linear_divergence(*call)
        assert torch.equal(call.teacher, before)


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_a_class_the_teacher_rules_out_costs_nothing(kind: str) -> None:
    """With logits of -inf the divergence is that over the other classes' terms, not NaN."""
    call = make_call(teacher="logits", dead=3, kind=kind)
    loss = run(call, *leaves_of(call))
    gradients = torch.autograd.grad(loss, leaves_of(call))
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_reverse_divergence_from_a_class_ruled_out_is_infinite() -> None:
    call = make_call(teacher="logits", dead=1, kind="reverse_kl")
    assert run(call, *leaves_of(call)) == torch.inf


@pytest.mark.parametrize(
    "options", [{}, {"teacher": "probabilities", "reduction": "none"}, {"schedule": "backward", "bias": True}]
)
def test_opcheck(options: dict[str, Any]) -> None:
    assert set(opcheck(OP.default, tuple(make_call(**options))).values()) == {"SUCCESS"}


def test_opcheck_of_the_backward_op() -> None:
    call = make_call(schedule="backward", bias=True, frozen=frozenset({"x", "weight", "bias"}))
    arguments = (torch.tensor(0.5), *call._replace(gradients=[True, True, True, False, False]))
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    assert set(opcheck(BACKWARD.default, arguments, test_utils=tests).values()) == {"SUCCESS"}


@pytest.mark.parametrize("teacher", TEACHERS)
def test_no_rows(teacher: str) -> None:
    call = make_call(rows=0, teacher=teacher)
    loss = run(call, *leaves_of(call))
    assert loss.isnan()  # the mean of nothing, as in torch
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, leaves_of(call)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "tv"}, "kind is 'tv'"),
        ({"reduction": "max"}, "reduction is 'max'"),
        ({"schedule": "later"}, "schedule is 'later'"),
        ({"teacher_form": "odds"}, "teacher_form is 'odds'"),
        ({"kind": "jsd", "beta": 1.0}, "beta is 1.0"),
        ({"label_smoothing": 0.1}, "label_smoothing is 0.1"),
        ({"row_weight": torch.ones(13)}, "row_weight goes with"),
        ({"reduction": "none"}, "use schedule='backward'"),
        ({"teacher": torch.ones(13, 37)}, "either teacher, or"),
        ({"teacher_form": "probabilities"}, "whose logits are given or made"),
        ({"teacher_x": torch.ones(12, 5)}, "teacher_x has 12 rows"),
        ({"teacher_x": torch.ones(13, 5).double()}, "both float64 or neither"),
        ({"teacher_x": None, "teacher_weight": None, "teacher": torch.ones(13, 36)}, "teacher has shape"),
        (
            {"teacher_x": None, "teacher_weight": None, "teacher": torch.ones(13, 37), "teacher_bias": torch.ones(37)},
            "teacher_bias goes with",
        ),
        ({"epilogue": "mul:scalar0"}, "epilogue is 'mul:scalar0'; allowed: steps whose operands are numbers"),
        ({"teacher_epilogue": "add:class0"}, "teacher_epilogue is 'add:class0'; allowed: steps whose"),
    ],
)
def test_meaningless_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StructflyError, match=message):
        linear_divergence(*make_call()._replace(**changes))


def test_a_gradient_that_was_left_out_is_refused() -> None:
    call = make_call()._replace(gradients=[True, False, False, False, False])
    with pytest.raises(StructflyError, match="gradient of 'weight'"):
        linear_divergence(*call)[0].backward()


@pytest.mark.parametrize("schedule", ["forward", "backward"])
def test_differentiating_twice_is_refused(schedule: str) -> None:
    call = make_call(schedule=schedule)
    (gradient,) = torch.autograd.grad(run(call, *leaves_of(call)), [call.x], create_graph=True)
    with pytest.raises(UnsupportedError, match="linear_divergence was differentiated twice"):
        gradient.sum().backward()


def test_vmap_runs_entry_by_entry() -> None:
    call = make_call(frozen=frozenset({"x", "weight"}))
    batch = torch.stack([call.x, call.x * 2, call.x - 1])
    together = torch.vmap(lambda x: OP.default(*call._replace(x=x))[0])(batch)
    one_by_one = torch.stack([linear_divergence(*call._replace(x=x))[0] for x in batch])
    assert torch.equal(together, one_by_one)


def test_autocast_runs_the_products_in_its_dtype() -> None:
    call = make_call()
    names = ("x", "weight", "teacher_x", "teacher_weight")
    low: dict[str, Any] = {name: getattr(call, name).bfloat16() for name in names}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_divergence(*call)[0]
    loss.backward()
    assert torch.equal(loss, linear_divergence(*call._replace(**low))[0])
    assert call.x.grad is not None
    assert call.x.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("schedule", "forward", "backward"), [("forward", 3, 0), ("backward", 1, 3)], ids=["6NHC", "8NHC"]
)
@pytest.mark.parametrize("teacher", ["head", "probabilities"])
def test_flop_count(schedule: str, forward: int, backward: int, teacher: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    call = make_call(schedule=schedule, teacher=teacher)
    product, of_teacher = 2 * 13 * 8 * 37, 2 * 13 * 5 * 37 * (teacher == "head")
    with FlopCounterMode(display=False) as counter:
        loss = run(call, *leaves_of(call))
        assert counter.get_total_flops() == forward * product + of_teacher
        loss.backward()
    again = of_teacher if schedule == "backward" else 0
    assert counter.get_total_flops() == (forward + backward) * product + of_teacher + again

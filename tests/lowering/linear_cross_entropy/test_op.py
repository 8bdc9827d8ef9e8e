"""The op against its reference in float64, and its contracts with torch."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from structfly.errors import StructflyError, UnsupportedError
from structfly.lowering.linear_cross_entropy import flops, transforms
from structfly.lowering.linear_cross_entropy.arguments import STATISTICS, Arguments
from structfly.lowering.linear_cross_entropy.op import linear_cross_entropy
from tests.lowering.linear_cross_entropy.cases import (
    calls,
    gradients_of,
    joined,
    leaves_of,
    make_call,
    names_of,
    run,
    run_all,
    run_reference,
    run_reference_all,
)
from tests.oracle import FEW, assert_as_accurate, assert_like_eager, in_float64

OP = torch.ops.structfly.linear_cross_entropy_v4
BACKWARD = torch.ops.structfly.linear_cross_entropy_backward_v4
_REGISTERED = (flops, transforms)  # imported for what they register


def flat_results(call: Arguments) -> list[Tensor]:
    made = linear_cross_entropy(*call)
    return [*made[:-1], *made.grad_operands]


def upstream_for(call: Arguments) -> Tensor:
    shape = call.x.shape[:1] if call.reduction == "none" else ()
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@settings(max_examples=120)
@given(call=calls())
def test_as_accurate_as_the_reference(call: Arguments) -> None:
    assert_like_eager(
        partial(run, call), partial(run_reference, call), leaves_of(call), call.x.dtype, upstream_for(call)
    )


@settings(max_examples=50)
@given(call=calls((torch.float32, torch.float64), STATISTICS), without_target=st.booleans())
def test_statistics_are_as_accurate_as_the_reference(call: Arguments, without_target: bool) -> None:
    if call.schedule == "forward":  # values beside a loss, which alone has gradients
        values, leaves = run_all(call, *leaves_of(call)), leaves_of(call)
        assert all(value.requires_grad <= (name == "loss") for name, value in values.items())
        exact = run_reference_all(call, *map(in_float64, leaves))
        for name, value in run_reference_all(call, *leaves).items():
            if name != "argmax":
                mine, eager, true = (each.detach() for each in (values[name], value, exact[name]))
                assert_as_accurate(mine, eager, true, call.x.dtype, name)
        made, alone = (linear_cross_entropy(*each) for each in (call, call._replace(statistics="", choices=None)))
        assert all(map(torch.equal, gradients_of(made).each, gradients_of(alone).each))
        return
    if without_target and "losses" not in call.statistics and call.statistics:
        changes: dict[str, Any] = {"target": None, "class_weight": None, "row_weight": None, "reduction": "none"}
        call = call._replace(**changes)

    if not set(names_of(call)) <= {"losses", "argmax"}:
        check_statistics(call)


def check_statistics(call: Arguments, roundings: int = FEW) -> None:
    """All that is differentiated, with upstream gradients of both signs."""

    def op(*leaves: Tensor) -> Tensor:
        return joined(run_all(call, *leaves)).to(call.loss_dtype)

    def reference(*leaves: Tensor) -> Tensor:
        return joined(run_reference_all(call, *leaves))

    upstream = torch.randn(op(*leaves_of(call)).shape, generator=torch.Generator().manual_seed(1))
    assert_like_eager(op, reference, leaves_of(call), call.x.dtype, upstream, roundings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"epilogue": "div:3.0,tanh,mul:3.0", "bias": True, "class_mask": True},
        {"epilogue": "mul:scalar0,tanh,add:class1,div:row2"},
    ],
)
def test_statistics_are_as_accurate_as_the_reference_at_size(dtype: torch.dtype, options: dict[str, Any]) -> None:
    sizes: dict[str, Any] = {"rows": 300, "hidden": 32, "classes": 503, "workspace": 128 * 512 * dtype.itemsize}
    call = make_call(dtype=dtype, reduction="none", statistics="chosen,entropy,lse", **sizes, **options)
    if call.epilogue.endswith("-inf") and call.target is not None:  # classes that are live
        call = call._replace(choices=torch.stack([call.target.clamp_min(0)] * 2, 1))
    check_statistics(call, roundings=2)  # dz has terms of several statistics, each rounded


def test_the_argmax_is_a_largest_logit() -> None:
    call = make_call(statistics="argmax", rows=200, classes=70, dtype=torch.bfloat16, workspace=2**12)
    logits = torch.nn.functional.linear(call.x, call.weight)
    argmax = linear_cross_entropy(*call).argmax
    assert torch.equal(logits.gather(1, argmax.unsqueeze(1)).squeeze(1), logits.amax(1))


def test_dead_classes_add_nothing_to_the_entropy() -> None:
    call = make_call(statistics="entropy", class_mask=True, schedule="backward", reduction="none")
    made = linear_cross_entropy(*call).entropy
    logits = torch.nn.functional.linear(call.x, call.weight[call.operands[-1]])
    torch.testing.assert_close(made, torch.distributions.Categorical(logits=logits).entropy())
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(made.sum(), [call.x, call.weight]))


def test_a_row_that_weighs_nothing_keeps_its_statistics() -> None:
    call = make_call(statistics="losses,lse", row_weight=True, ignored=0.0)
    assert call.row_weight is not None
    call.row_weight[4] = 0.0
    made, plain = (linear_cross_entropy(*each) for each in (call, call._replace(row_weight=None)))
    assert torch.equal(made.losses, plain.losses)
    assert torch.equal(made.lse, plain.lse)
    assert made.grad_x[4].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"epilogue": "div:3.0,tanh,mul:3.0", "bias": True},
        {"label_smoothing": 0.1},
        {"row_weight": True},
        {"epilogue": "mul:scalar0,tanh,add:class1,div:row2"},
    ],
)
def test_as_accurate_as_the_reference_at_size(dtype: torch.dtype, options: dict[str, Any]) -> None:
    call = make_call(dtype=dtype, rows=500, hidden=64, classes=1003, workspace=128 * 1008 * dtype.itemsize, **options)
    assert_like_eager(partial(run, call), partial(run_reference, call), leaves_of(call), dtype, roundings=1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"epilogue": "div:3.0,tanh,mul:3.0", "bias": True, "class_mask": True},
        {"label_smoothing": 0.1, "class_weight": True, "rank": 4},
        {"reduction": "none", "ignore_index": None},
        {"row_weight": True, "cut": 3},
        {"schedule": "backward", "transposed": True},
        {"epilogue": "mul:scalar0,tanh,add:class1,div:row2", "label_smoothing": 0.1},
        {"epilogue": "add:class0,sigmoid,mul:class1,where:row2:class3,sub:scalar4", "schedule": "backward"},
    ],
)
def test_as_accurate_as_the_reference_on_cuda(dtype: torch.dtype, options: dict[str, Any]) -> None:
    call = make_call(
        dtype=dtype, rows=500, hidden=64, classes=1003, workspace=128 * 1008 * dtype.itemsize, device="cuda", **options
    )
    upstream = upstream_for(call).cuda()
    fast, reference = partial(run, call), partial(run_reference, call)
    # Products in another order than eager's: in float32 that is more than one rounding.
    assert_like_eager(fast, reference, leaves_of(call), dtype, upstream, roundings=8 if dtype == torch.float32 else 1)


@settings(max_examples=60)
@given(call=calls(dtypes=(torch.float32, torch.float64)))
def test_chunk_length_does_not_change_the_loss(call: Arguments) -> None:
    whole = run(call._replace(workspace=2**30), *leaves_of(call))
    torch.testing.assert_close(run(call, *leaves_of(call)), whole, rtol=1e-5, atol=1e-6, equal_nan=True)


@settings(max_examples=25)
@given(call=calls(dtypes=(torch.float32, torch.bfloat16)))
def test_same_bits_every_time(call: Arguments) -> None:
    for first, second in zip(flat_results(call), flat_results(call), strict=True):
        assert torch.equal(first.nan_to_num(), second.nan_to_num())


LEARNED = "mul:scalar0,tanh,add:class1,where:row2:-2.0,div:row3,clamp_max:1.1,sub:scalar4"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "none", "statistics": "lse,entropy,argmax,chosen"},
        {"statistics": "losses,entropy"},
        {"schedule": "backward", "bias": True},
        {"rank": 2},
        {"epilogue": LEARNED},
        {"epilogue": LEARNED, "reduction": "none", "statistics": "lse,entropy,argmax,chosen"},
        {"epilogue": LEARNED, "schedule": "backward", "frozen": frozenset({"x", "weight"})},
    ],
)
def test_opcheck(options: dict[str, Any]) -> None:
    results = opcheck(OP.default, tuple(make_call(**options)))
    assert set(results.values()) == {"SUCCESS"}


def test_opcheck_of_the_backward_op() -> None:
    frozen = frozenset({"x", "weight", "bias", "operands"})
    call = make_call(schedule="backward", bias=True, frozen=frozen, epilogue="add:class0,mul:row1")
    arguments = (
        torch.tensor(0.5),
        None,
        None,
        None,
        *call._replace(gradients=[True, True, True, False, False, True, False]),
    )
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    assert set(opcheck(BACKWARD.default, arguments, test_utils=tests).values()) == {"SUCCESS"}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_rows_ignored(reduction: str) -> None:
    call = make_call(ignored=1.0, reduction=reduction, bias=True)
    loss = run(call, *leaves_of(call))
    gradients = torch.autograd.grad(loss, leaves_of(call), torch.ones_like(loss))
    assert bool(loss.isnan().all()) == (reduction == "mean")  # as torch
    assert not any(gradient.any() for gradient in gradients)


def test_only_wanted_gradients_are_made() -> None:
    call = make_call(bias=True, frozen=frozenset({"weight"}))
    gradients = gradients_of(linear_cross_entropy(*call))
    assert gradients.x.shape == call.x.shape
    assert gradients.weight.numel() == 0
    assert call.bias is not None
    assert gradients.bias.shape == call.bias.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("schedule", ["forward", "backward"])
def test_an_operand_alone_can_have_a_gradient_in_its_own_dtype(dtype: torch.dtype, schedule: str) -> None:
    call = make_call(
        dtype=torch.bfloat16,
        epilogue=LEARNED,
        operand_dtype=dtype,
        frozen=frozenset({"x", "weight"}),
        schedule=schedule,
    )
    assert_like_eager(partial(run, call), partial(run_reference, call), leaves_of(call), torch.bfloat16)


@pytest.mark.parametrize("name", ["weight", "operands[1]"])
def test_a_gradient_that_was_left_out_is_refused(name: str) -> None:
    call = make_call(epilogue="mul:scalar0,add:class1")
    order = ["x", "weight", "bias", "adapter_x", "adapter_weight", "operands[0]", "operands[1]"]
    call = call._replace(gradients=[flag and each != name for flag, each in zip(call.gradients, order, strict=True)])
    with pytest.raises(StructflyError, match=re.escape(f"gradient of '{name}'")):
        linear_cross_entropy(*call).loss.backward()


@pytest.mark.parametrize("bad", [37, -1, -100])
def test_a_target_out_of_range_is_refused_as_torch_does(bad: int) -> None:
    call = make_call(ignore_index=None)
    assert call.target is not None
    call.target[3] = bad
    with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
        linear_cross_entropy(*call)


def test_a_choice_out_of_range_is_refused() -> None:
    call = make_call(statistics="chosen")
    assert call.choices is not None
    call.choices[2, 1] = 37
    with pytest.raises(IndexError, match="Choice 37 is out of bounds"):
        linear_cross_entropy(*call)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reduction": "max"}, "reduction is 'max'"),
        ({"schedule": "later"}, "schedule is 'later'"),
        ({"epilogue": "relu"}, "step 'relu' of 'relu' is not known"),
        ({"epilogue": "mul"}, "mul takes a number or tensor"),
        ({"epilogue": "div:0.0"}, "a divisor may not be 0"),
        ({"epilogue": "where:1.0:2.0"}, "where takes a tensor and a number or tensor"),
        ({"epilogue": "mul:class1"}, "number them from 0 on"),
        ({"epilogue": "mul:class0", "operands": []}, "0 operands and 5 flags"),
        (
            {"epilogue": "mul:class0", "operands": [torch.ones(13)], "gradients": [True] * 6},
            "operand class0 .* has shape",
        ),
        (
            {"epilogue": "where:row0:1.0", "operands": [torch.ones(13)], "gradients": [True] * 6},
            "it takes .* torch.bool",
        ),
        ({"row_weight": torch.ones(13)}, "row_weight goes with"),
        ({"reduction": "none"}, "use schedule='backward'"),
        ({"statistics": "lse,mode"}, "statistics 'mode'"),
        ({"statistics": "chosen"}, "goes with choices"),
        ({"target": None}, "without a target"),
        ({"statistics": "losses", "reduction": "none", "schedule": "backward"}, "goes with a reduced loss"),
    ],
)
def test_meaningless_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StructflyError, match=message):
        linear_cross_entropy(*make_call()._replace(**changes))


@pytest.mark.parametrize("schedule", ["forward", "backward"])
def test_backward_can_run_twice(schedule: str) -> None:
    call = make_call(schedule=schedule)
    loss = run(call, *leaves_of(call))
    first = torch.autograd.grad(loss, leaves_of(call), torch.tensor(3.0), retain_graph=True)
    second = torch.autograd.grad(loss, leaves_of(call), torch.tensor(3.0))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("schedule", ["forward", "backward"])
def test_differentiating_twice_is_refused(schedule: str) -> None:
    call = make_call(schedule=schedule)
    (gradient,) = torch.autograd.grad(run(call, *leaves_of(call)), [call.x], create_graph=True)
    with pytest.raises(UnsupportedError, match="differentiated twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("scale", [1.0, 2.0**16, 2.0**-14])
@pytest.mark.parametrize("schedule", ["forward", "backward"])
def test_float16_keeps_its_accuracy_under_a_gradient_scaler(schedule: str, scale: float) -> None:
    call = make_call(dtype=torch.float16, rows=300, classes=500, schedule=schedule, workspace=64 * 512 * 2)
    upstream = torch.tensor(scale)
    leaves = leaves_of(call)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    mine = torch.autograd.grad(run(call, *leaves), leaves, upstream)
    reference = torch.autograd.grad(run_reference(call, *exact), exact, upstream.double())
    for gradient, true in zip(mine, reference, strict=True):
        bound = true.abs() * 2e-3 + 2.0**-24 + true.norm() / true.numel() ** 0.5 * 2e-3
        assert ((gradient.double() - true).abs() <= bound).all()


@pytest.mark.parametrize("options", [{"epilogue": "mul:100.0"}, {"epilogue": "div:scalar0,mul:row1"}])
def test_float16_has_room_for_steep_chains(options: dict[str, Any]) -> None:
    call = make_call(dtype=torch.float16, class_weight=True, operand_dtype=torch.float32, **options)
    with torch.no_grad():
        call.x.mul_(0.01)
        if call.operands:
            call.operands[0].fill_(0.004)
        if call.class_weight is not None:
            call.class_weight.mul_(50.0)
    assert_like_eager(partial(run, call), partial(run_reference, call), leaves_of(call), torch.float16)


def test_float16_has_no_room_for_chains_of_any_slope() -> None:
    call = make_call(dtype=torch.float16, epilogue="exp")
    with pytest.raises(StructflyError, match="has no bound"):
        linear_cross_entropy(*call)


def test_bfloat16_weight_gradient_over_chunks_is_as_accurate_as_in_one() -> None:
    call = make_call(dtype=torch.bfloat16, rows=2048, classes=64, hidden=16, ignored=0.0)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves_of(call)]
    (reference,) = torch.autograd.grad(run_reference(call, *exact), [exact[1]])

    def error(loss: Tensor) -> float:
        (gradient,) = torch.autograd.grad(loss, [call.weight])
        return float((gradient.double() - reference).norm() / reference.norm())

    whole, *parts = (
        error(run(call._replace(workspace=2048 // chunks * 64 * 2), *leaves_of(call))) for chunks in (1, 2, 4, 64)
    )
    assert whole <= 1.05 * error(run_reference(call, *leaves_of(call)))
    assert max(parts) <= 1.05 * whole  # summed in bfloat16 it would be more


def test_vmap_runs_entry_by_entry() -> None:
    call = make_call(frozen=frozenset({"x", "weight"}))
    batch = torch.stack([call.x, call.x * 2, call.x - 1])
    together = torch.vmap(lambda x: OP.default(*call._replace(x=x))[0])(batch)
    one_by_one = torch.stack([linear_cross_entropy(*call._replace(x=x)).loss for x in batch])
    assert torch.equal(together, one_by_one)


def test_vmap_takes_batches_of_operands() -> None:
    call = make_call(frozen=frozenset({"x", "weight", "operands"}), epilogue="mul:scalar0,add:class1")
    scale, shift = call.operands
    batch = torch.stack([scale, scale * 2])
    together = torch.vmap(lambda s: OP.default(*call._replace(operands=[s, shift]))[0])(batch)
    one_by_one = torch.stack([linear_cross_entropy(*call._replace(operands=[s, shift])).loss for s in batch])
    assert torch.equal(together, one_by_one)


def test_a_fill_of_minus_infinity_may_be_scaled_by_what_is_learned() -> None:
    call = make_call(epilogue="where:class0:-inf,mul:class1", ignored=0.0)
    live = call.operands[0].clone()
    assert call.target is not None
    live[call.target] = True
    call = call._replace(operands=[live, call.operands[1]])
    gradients = torch.autograd.grad(run(call, *leaves_of(call)), leaves_of(call))
    assert gradients[0].isfinite().all()
    reference = torch.autograd.grad(run_reference(call, *leaves_of(call)), leaves_of(call))
    assert torch.equal(gradients[2].isnan(), reference[2].isnan())  # 0 times infinity, as eager has it


def test_autocast_runs_the_products_in_its_dtype() -> None:
    call = make_call()
    low = call._replace(x=call.x.bfloat16(), weight=call.weight.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(*call).loss
    loss.backward()
    assert torch.equal(loss, linear_cross_entropy(*low).loss)
    assert call.x.grad is not None
    assert call.x.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("scheme", "schedule", "forward", "backward"),
    [
        ("logits", "forward", 3, 0),
        ("logits", "backward", 1, 3),
        ("blocks", "forward", 4, 0),
        ("blocks", "backward", 1, 4),
    ],
    ids=["6NHC", "8NHC", "8NHC in blocks", "10NHC in blocks"],
)
@pytest.mark.filterwarnings("ignore:.*overflow.*:RuntimeWarning")
def test_flop_count(scheme: str, schedule: str, forward: int, backward: int) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    dtype = torch.float32 if scheme == "logits" else torch.bfloat16
    call = make_call(scheme=scheme, schedule=schedule, dtype=dtype)
    product = 2 * 13 * 8 * 37
    with FlopCounterMode(display=False) as counter:
        loss = run(call, *leaves_of(call))
        assert counter.get_total_flops() == forward * product
        loss.backward()
    assert counter.get_total_flops() == (forward + backward) * product

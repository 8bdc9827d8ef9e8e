"""Losses of single rows as programs: as accurate as autograd, in one pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from structfly.errors import StructflyError
from structfly.lowering.head.chunks import wide_dtype
from structfly.lowering.linear_cross_entropy import flops, rows_aten, transforms
from structfly.lowering.linear_cross_entropy.arguments import Arguments
from structfly.lowering.linear_cross_entropy.chunked import run_chunks
from structfly.lowering.linear_cross_entropy.op import linear_cross_entropy
from structfly.lowering.linear_cross_entropy.row_program import OPERATIONS, RowLoss, parse_row_program
from structfly.lowering.linear_cross_entropy.rows import RowStatistics
from structfly.lowering.linear_cross_entropy.rows_aten import row_step_aten
from structfly.lowering.linear_cross_entropy.rows_triton import row_step_triton
from tests.lowering.linear_cross_entropy.cases import leaves_of, make_call, run, run_reference
from tests.oracle import assert_like_eager

OP = torch.ops.structfly.linear_cross_entropy_v4
# numpy, which interprets the kernels, warns where a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
_REGISTERED = (flops, transforms)  # imported for what they register

# r0: (N,), r1: (N,) flags, r2: ().
PROGRAMS = {
    "weighted": "mul loss r0;div %0 r2",
    "flagged": "where r1 loss 0.0",
    "z-loss": "square lse;mul %0 0.01;add loss %1",
    "focal": "neg loss;exp %0;sub 1.0 %1;square %2;mul %3 loss",
    "on-policy": "neg loss;detach %0;sub %0 %1;exp %2;mul %3 r0",
    "clipped": "neg loss;sub %0 r0;exp %1;mul %2 r2;clamp %2 0.8 1.2;mul %4 r2;min %3 %5;neg %6",
    "kl": "add r0 loss;exp %0;sub %1 %0;sub %2 1.0;mul %3 0.1;add loss %4",
    "entropy bonus": "mul entropy 0.1;add loss %0",
    "dft": "neg loss;exp %0;detach %1;mul %2 loss",
    "preference": "sub chosen0 chosen1;logsigmoid %0;neg %1",
    "hits": "eq argmax r0;number %0;add %1 0.5;square lse;mul %2 %3",
    "softened": "abs entropy;add %0 1.0;log %1;pow %2 2.0;max %3 loss;reciprocal r2;mul %4 %5",
    "none": "mul r0 2.0",
}
# The same for groups (2, T), r0: (G, 2, T), r1: (G, 2, 1), r2: (G, 1, 1), r3: ().
GROUP_PROGRAMS = {
    "dpo": "mul loss r0;sum %0 2;part %1 1 1;part %1 1 0;sub %2 %3;sub %4 r2;mul %5 0.5;logsigmoid %6;neg %7",
    "ipo": "neg loss;part %0 1 0;sum %1 2;part %0 1 1;sum %3 2;sub %2 %4;div %5 r3;sub %6 0.5;square %7",
    "dpo and cross-entropy of the better": (
        "mul loss r0;sum %0 2;sub %1 r1;part %2 1 1;part %2 1 0;sub %3 %4;logsigmoid %5;neg %6;part %1 1 0;"
        "mul %8 r3;add %7 %9"
    ),
    "ratio of sequences": "neg loss;mul %0 r0;sum %1 2;detach %2;sub %0 %0;add %4 %2;sub %5 %3;exp %6;mul %7 r1",
    "z-loss of sequences": "sum lse 2;square %0;mul %1 r3",
    "entropy of groups": "sum entropy 2;sum %0 1;tanh %1;mul %2 r2",
    "preference of two tokens": "sub chosen0 chosen1;sum %0 2;logsigmoid %1;mul %2 r1",
    "hits of groups": "eq argmax 3.0;number %0;sum %1 2;add %2 1.0;sum loss 2;div %4 %3",
    "of single rows": "square loss;mul %0 r0",
}


def call_of(name: str, **options: Any) -> Arguments:
    program = PROGRAMS[name]
    call = make_call(statistics="chosen", reduction="sum", **options)
    rows = call.x.shape[0]
    generator = torch.Generator().manual_seed(3)
    operands = [torch.rand(rows, generator=generator), torch.rand(rows, generator=generator) < 0.5, torch.tensor(2.5)]
    taken = parse_row_program(program).operands
    return call._replace(row_loss=program, row_operands=operands[:taken], statistics="")


def group_call_of(name: str, groups: int = 4, length: int = 3, **options: Any) -> Arguments:
    program = GROUP_PROGRAMS[name]
    call = make_call(statistics="chosen", reduction="sum", rows=groups * 2 * length, **options)
    generator = torch.Generator().manual_seed(3)
    shapes = [(groups, 2, length), (groups, 2, 1), (groups, 1, 1)]
    operands = [torch.rand(shape, generator=generator) for shape in shapes] + [torch.tensor(2.5)]
    taken = parse_row_program(program).operands
    return call._replace(row_loss=program, row_operands=operands[:taken], row_group=[2, length], statistics="")


def beside_one(function: Callable[..., Tensor], call: Arguments, *leaves: Tensor) -> Tensor:
    """A loss of a few rows may be as small as its rounding; beside a 1 it is held to that."""
    loss = function(call, *leaves)
    return torch.stack([loss, torch.ones_like(loss)])


@settings(max_examples=30)
@given(
    name=st.sampled_from(sorted(PROGRAMS.keys() - {"none"})),
    dtype=st.sampled_from((torch.float32, torch.float64, torch.bfloat16)),
    rows=st.integers(0, 30),
    seed=st.integers(0, 999),
    workspace=st.integers(1, 20),
    epilogue=st.sampled_from(("", "div:3.0,tanh,mul:3.0", "mul:scalar0,tanh,add:class1,div:row2")),
    flags=st.fixed_dictionaries(dict.fromkeys(("bias", "class_weight", "class_mask"), st.booleans())),
)
def test_as_accurate_as_the_reference(name: str, dtype: torch.dtype, workspace: int, **options: Any) -> None:
    flags = options.pop("flags")
    if name == "preference":  # a masked class has no finite logit
        flags["class_mask"] = False
    call = call_of(name, dtype=dtype, workspace=workspace * 48 * dtype.itemsize, **options, **flags)
    mine, reference = (partial(beside_one, function, call) for function in (run, run_reference))
    assert_like_eager(mine, reference, leaves_of(call), dtype, torch.tensor([-0.75, 0.0]))


@settings(max_examples=40)
@given(
    name=st.sampled_from(sorted(GROUP_PROGRAMS)),
    dtype=st.sampled_from((torch.float32, torch.float64, torch.bfloat16)),
    groups=st.integers(0, 5),
    length=st.integers(1, 6),
    seed=st.integers(0, 999),
    workspace=st.integers(1, 70),
    block=st.integers(1, 30),
    epilogue=st.sampled_from(("", "mul:scalar0,tanh,add:class1,div:row2")),
    flags=st.fixed_dictionaries(dict.fromkeys(("bias", "class_weight"), st.booleans())),
)
def test_groups_as_accurate_as_the_reference(
    name: str, dtype: torch.dtype, workspace: int, block: int, **options: Any
) -> None:
    """Chunks of one group, of several, of less than one, and the same for the row step's blocks."""
    flags = options.pop("flags")
    call = group_call_of(name, dtype=dtype, workspace=workspace * 48 * dtype.itemsize, **options, **flags)
    mine, reference = (partial(beside_one, function, call) for function in (run, run_reference))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(rows_aten, "_BLOCK_BYTES", block * 37 * wide_dtype(dtype).itemsize)
        assert_like_eager(mine, reference, leaves_of(call), dtype, torch.tensor([-0.75, 0.0]))


@pytest.mark.parametrize("name", [*PROGRAMS, *GROUP_PROGRAMS])
def test_triton_rows_give_the_same(name: str) -> None:
    call = call_of(name, rows=9, ignored=0.3) if name in PROGRAMS else group_call_of(name)
    program = parse_row_program(call.row_loss)
    operands = tuple(each if each.dtype == torch.bool else each.float() for each in call.row_operands)
    with torch.no_grad():
        made = [
            run_chunks(call.head, RowLoss(program, operands, tuple(call.row_group)), call.wanted, 8 * 48 * 4, step)
            for step in (row_step_aten, row_step_triton)
        ]
    for mine, theirs in (
        (made[0].row_losses, made[1].row_losses),
        (made[0].gradients.x, made[1].gradients.x),  # type: ignore[union-attr]
        (made[0].gradients.weight, made[1].gradients.weight),  # type: ignore[union-attr]
    ):
        assert mine is not None
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_the_loss_is_the_users_formula() -> None:
    call = call_of("clipped", ignored=0.0)
    logits = torch.nn.functional.linear(call.x, call.weight)
    assert call.target is not None
    log_p = logits.log_softmax(1).gather(1, call.target.unsqueeze(1)).squeeze(1)
    ratio = torch.exp(log_p - call.row_operands[0])
    loss = -torch.min(ratio * 2.5, ratio.clamp(0.8, 1.2) * 2.5).sum()
    made = run(call, *leaves_of(call))
    torch.testing.assert_close(made, loss)
    for mine, theirs in zip(
        torch.autograd.grad(made, leaves_of(call)), torch.autograd.grad(loss, leaves_of(call)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_every_operation_is_torchs() -> None:
    x = torch.tensor([0.3, 0.9, 1.7])
    found = RowStatistics(lse=x, entropy=x.flip(0))
    torch_names = {"min": "minimum", "max": "maximum", "and": "logical_and", "or": "logical_or", "not": "logical_not"}
    for name, (count, _) in OPERATIONS.items():
        if name in ("clamp", "where", "number", "sum", "part"):
            continue
        function = getattr(torch, torch_names.get(name, name), None) or getattr(torch.nn.functional, name)
        made = parse_row_program(f"{name} {' '.join(('lse', 'entropy')[:count])}").run(found, [])
        assert torch.equal(made, function(*(x, x.flip(0))[:count]).to(x.dtype)), name


def test_one_pass() -> None:
    call, product = call_of("focal"), 2 * 13 * 8 * 37
    with FlopCounterMode(display=False) as counter:
        run(call, *leaves_of(call)).backward()
    assert counter.get_total_flops() == 3 * product


@pytest.mark.parametrize(("fitting", "products"), [(6, 3), (23, 3), (24, 3), (5, 4)])
def test_one_pass_where_a_group_fits(fitting: int, products: int) -> None:
    call = group_call_of("dpo", workspace=fitting * 48 * 4)
    with FlopCounterMode(display=False) as counter:
        run(call, *leaves_of(call)).backward()
    assert counter.get_total_flops() == products * 2 * 24 * 8 * 37


def test_without_gradients_statistics_are_made_once() -> None:
    frozen = frozenset({"x", "weight"})
    call = group_call_of("dpo", workspace=48 * 4, frozen=frozen)
    with FlopCounterMode(display=False) as counter:
        made = run(call, *leaves_of(call))
    torch.testing.assert_close(made, run_reference(call, *leaves_of(call)))
    assert counter.get_total_flops() == 2 * 24 * 8 * 37


def test_statistics_beside_a_program() -> None:
    call = call_of("clipped")._replace(statistics="losses,entropy,chosen")
    made, plain = linear_cross_entropy(*call), linear_cross_entropy(*call._replace(row_loss="", row_operands=[]))
    for name in ("losses", "entropy", "chosen"):
        torch.testing.assert_close(getattr(made, name), getattr(plain, name))
        assert not getattr(made, name).requires_grad
    assert made.lse.numel() == 0


@pytest.mark.parametrize("call", [call_of("clipped"), call_of("preference"), group_call_of("dpo")])
def test_opcheck(call: Arguments) -> None:
    results = opcheck(OP.default, tuple(call))
    assert set(results.values()) == {"SUCCESS"}


def test_without_recorded_gradients() -> None:
    call = call_of("focal", frozen=frozenset({"x", "weight"}))
    wanted = call._replace(gradients=[True, True, False, False, False, *[False] * len(call.operands)])
    with torch.inference_mode():
        made = linear_cross_entropy(*wanted)
    torch.testing.assert_close(made.loss, run_reference(call, *leaves_of(call)))
    assert made.grad_x.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row_loss": "exp"}, "expected 1 arguments"),
        ({"row_loss": "cosh loss"}, "expected one of add"),
        ({"row_loss": "exp %0"}, "'%0' is no statistic"),
        ({"row_loss": "exp loss", "row_operands": [torch.ones(13)]}, "reads 0 operands, there are 1"),
        ({"row_loss": "exp loss", "schedule": "backward"}, "goes with schedule='forward'"),
        ({"row_loss": "exp chosen0", "choices": None}, "reads 'chosen'"),
        ({"row_loss": "", "row_operands": [torch.ones(13)]}, "go with a row_loss"),
        ({"row_loss": "", "row_group": [13]}, "go with a row_loss"),
        ({"row_loss": "sum loss 1"}, "row_group is \\[\\]; allowed are 1 sizes or more"),
        ({"row_loss": "sum loss 1", "row_group": [2]}, "whose product divides the 13 rows"),
        ({"row_loss": "sum loss 1", "row_group": [0]}, "from 1 up"),
        ({"row_loss": "sum loss 1", "row_group": [-13, -1]}, "from 1 up"),
        ({"row_loss": "sum loss lse", "row_group": [13]}, "dimensions count from 1"),
        ({"row_loss": "part loss 0 0", "row_group": [13]}, "dimensions count from 1"),
        ({"row_loss": "part loss 1 -1", "row_group": [13]}, "its places from 0"),
        ({"row_loss": "part loss 1.5 0", "row_group": [13]}, "dimensions count from 1"),
        ({"row_loss": "mul loss r0", "row_operands": [torch.ones(12)]}, "row operand 0 has shape \\(12,\\)"),
        ({"row_loss": "mul loss r0", "row_operands": [torch.ones(1, 2)], "row_group": [13]}, "allowed are \\(\\) and"),
    ],
)
def test_meaningless_programs_are_refused(changes: dict[str, Any], message: str) -> None:
    call = call_of("z-loss")._replace(**changes)
    with pytest.raises(StructflyError, match=message):
        linear_cross_entropy(*call)


def test_float16_is_refused() -> None:
    with pytest.raises(StructflyError, match="float16, which has not the range"):
        linear_cross_entropy(*call_of("z-loss", dtype=torch.float16))

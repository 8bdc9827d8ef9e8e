"""Both row steps against the formulas, differentiated by autograd in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structfly.errors import UnsupportedError
from structfly.lowering.head.chunks import ROWS_A_SUM
from structfly.lowering.head.epilogue import parse_epilogue
from structfly.lowering.linear_cross_entropy.rows import ClassTerms, RowStep
from structfly.lowering.linear_cross_entropy.rows_aten import row_step_aten
from structfly.lowering.linear_cross_entropy.rows_triton import row_step_triton
from tests.lowering.linear_cross_entropy.cases import EPILOGUES, epilogues, operands_of

STEPS = [pytest.param(row_step_aten, id="aten"), pytest.param(row_step_triton, id="triton")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # without a GPU the kernel is interpreted
PADDING = 5
# The interpreter computes in numpy, which warns where a GPU does not.
INTERPRETED = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning")


def exact(
    logits: Tensor, target: Tensor, coefficient: Tensor | None, terms: ClassTerms
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Losses, dz and the gradients of the operands that want one, of the formulas, in float64."""
    z = logits.double().requires_grad_()
    operands = [
        operand.double().requires_grad_() if want else operand.double() if operand.is_floating_point() else operand
        for operand, want in zip(terms.operands, terms.operand_gradients, strict=True)
    ]
    u = z if terms.bias is None else z + terms.bias.double()
    losses = F.cross_entropy(
        terms.epilogue.apply(u, operands),
        target,
        weight=None if terms.weight is None else terms.weight.double(),
        ignore_index=-1 if terms.ignore_index is None else terms.ignore_index,
        label_smoothing=terms.label_smoothing,
        reduction="none",
    )
    total = losses.sum()
    if coefficient is not None:
        losses = torch.where(coefficient != 0, losses, 0.0)
        total = (losses * coefficient.double()).sum()
    leaves = [operand for operand in operands if operand.requires_grad]
    dz, *sums = torch.autograd.grad(total, [z, *leaves])
    return losses.detach(), dz, sums


@st.composite
def row_problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None, ClassTerms]:
    rows, classes = draw(st.integers(1, 4)), draw(st.sampled_from((1, 2, 7, 33, 127, 128, 129, 300)))
    dtype = draw(st.sampled_from((torch.float32, torch.float16, torch.bfloat16)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    smoothing = draw(st.sampled_from((0.0, 0.1)))
    ignore_index = draw(st.sampled_from((-100, 0, None)))
    logits = (torch.randn(rows, classes + PADDING, generator=generator) * 3).to(dtype)
    target = torch.randint(0, classes, (rows,), generator=generator)
    if ignore_index is not None:
        target[draw(st.integers(0, rows - 1))] = ignore_index
    epilogue = draw(st.sampled_from(EPILOGUES) | epilogues())
    operands = operands_of(epilogue, rows, classes, generator, torch.float32)
    wanted = [operand.is_floating_point() and draw(st.booleans()) for operand in operands]
    if draw(st.booleans()) and not smoothing:  # a masked class under smoothing makes every loss infinite
        epilogue = ",".join(filter(None, (epilogue, f"where:class{len(operands)}:-inf")))
        operands.append(torch.rand(classes, generator=generator) < 0.8)
        operands[-1][target.clamp_min(0)] = True
        wanted.append(False)
    weight = torch.rand(classes, generator=generator) + 0.1 if draw(st.booleans()) else None
    coefficient = torch.randn(rows, generator=generator) if draw(st.booleans()) else None
    if coefficient is not None and draw(st.booleans()):
        coefficient[0] = 0.0
    terms = ClassTerms(
        epilogue=parse_epilogue(epilogue),
        operands=tuple(operands),
        operand_gradients=tuple(wanted),
        bias=torch.randn(classes, generator=generator).to(dtype) if draw(st.booleans()) else None,
        weight=weight,
        weight_sum=None if weight is None else weight.sum(),
        label_smoothing=smoothing,
        ignore_index=ignore_index,
        gradient_scale=draw(st.sampled_from((1.0, 2.0**11 if dtype == torch.float16 else 0.5))),
    )
    return logits, target, coefficient, terms


def on_device(value: Any) -> Any:
    return value.to(DEVICE) if isinstance(value, Tensor) else value


def terms_on_device(terms: ClassTerms) -> ClassTerms:
    moved = {name: on_device(value) for name, value in vars(terms).items()}
    return ClassTerms(**{**moved, "operands": tuple(map(on_device, terms.operands))})


def check(step: RowStep, logits: Tensor, target: Tensor, coefficient: Tensor | None, terms: ClassTerms) -> None:
    classes = logits.shape[1] - PADDING
    losses, dz, sums = exact(logits[:, :classes], target, coefficient, terms)
    buffer = logits.clone().to(DEVICE)
    place = terms_on_device(terms)
    forward = step(buffer.clone()[:, :classes], on_device(target), on_device(coefficient), place, gradient=False)
    made = step(buffer[:, :classes], on_device(target), on_device(coefficient), place, gradient=True)
    assert torch.equal(forward.losses, made.losses)
    torch.testing.assert_close(made.losses.cpu().double(), losses, rtol=2e-6, atol=4e-6, equal_nan=True)
    wanted = [operand for operand, want in enumerate(terms.operand_gradients) if want]
    for operand, share, true in zip(wanted, made.operand_sums, sums, strict=True):
        whole = share.sum() if terms.epilogue.operands[operand].kind == "scalar" else share
        torch.testing.assert_close(whole.cpu().double(), true, rtol=4e-5, atol=2e-5)
    rounding = torch.finfo(logits.dtype).eps
    scaled = dz * terms.gradient_scale
    torch.testing.assert_close(
        buffer[:, :classes].cpu().double(), scaled, rtol=rounding + 4e-5, atol=4e-6 * terms.gradient_scale
    )
    assert torch.equal(buffer[:, classes:].cpu(), logits[:, classes:]), "the padding was written"


@pytest.mark.parametrize("step", STEPS)
@INTERPRETED
@settings(max_examples=60)
@given(problem=row_problems())
def test_losses_and_gradients(step: RowStep, problem: tuple[Tensor, Tensor, Tensor | None, ClassTerms]) -> None:
    check(step, *problem)


@pytest.mark.parametrize("step", STEPS)
@INTERPRETED
def test_operands_of_every_kind_over_several_tiles(step: RowStep) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, classes = ROWS_A_SUM + 5, 530
    epilogue = "mul:scalar0,add:class1,tanh,div:row2,sub:class3"
    terms = plain_terms(
        epilogue=parse_epilogue(epilogue),
        operands=tuple(operands_of(epilogue, rows, classes, generator, torch.float32)),
        operand_gradients=(True, True, True, True),
        ignore_index=-100,
    )
    target = torch.randint(0, classes, (rows,), generator=generator)
    target[7] = -100
    coefficient = torch.randn(rows, generator=generator) / 8
    check(step, torch.randn(rows, classes + PADDING, generator=generator), target, coefficient, terms)


def plain_terms(**changes: Any) -> ClassTerms:
    return ClassTerms(
        **{
            "epilogue": parse_epilogue(""),
            "operands": (),
            "operand_gradients": (),
            "bias": None,
            "weight": None,
            "weight_sum": None,
            "label_smoothing": 0.0,
            "ignore_index": None,
            "gradient_scale": 1.0,
            **changes,
        }
    )


@pytest.mark.parametrize("step", STEPS)
@INTERPRETED
@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([0.0, 1.0, float("nan")], "nan"),
        ([0.0, float("inf"), 1.0], "nan"),
        ([-float("inf"), -float("inf"), -float("inf")], "nan"),
        ([0.0, 1.0, -float("inf")], "finite"),
        ([-float("inf"), 1.0, 2.0], "inf"),
        ([3e38, -3e38, 0.0], "finite"),
    ],
)
def test_special_values_as_torch(step: RowStep, row: list[float], expected: str) -> None:
    logits = torch.tensor([row])
    target = torch.tensor([0])
    reference = F.cross_entropy(logits, target, reduction="none")
    loss = step(logits.to(DEVICE), target.to(DEVICE), None, plain_terms(), gradient=False).losses.cpu()
    torch.testing.assert_close(loss, reference, equal_nan=True)
    assert {"nan": loss.isnan(), "inf": loss.isinf(), "finite": loss.isfinite()}[expected].all()


@pytest.mark.parametrize("step", STEPS)
def test_no_rows(step: RowStep) -> None:
    empty = torch.empty(0, 7, device=DEVICE)
    terms = plain_terms(
        epilogue=parse_epilogue("mul:scalar0,add:class1,div:row2"),
        operands=(torch.ones((), device=DEVICE), torch.ones(7, device=DEVICE), torch.ones(0, device=DEVICE)),
        operand_gradients=(True, True, True),
    )
    made = step(empty, torch.empty(0, dtype=torch.int64, device=DEVICE), None, terms, gradient=True)
    assert [part.shape for part in (made.losses, *made.operand_sums)] == [(0,), (0,), (7,), (0,)]
    assert not made.operand_sums[1].any()


def test_triton_rows_refuse_float64() -> None:
    with pytest.raises(UnsupportedError, match="float64"):
        row_step_triton(torch.empty(1, 3).double(), torch.tensor([0]), None, plain_terms(), gradient=False)


@pytest.mark.gpu
@pytest.mark.parametrize("classes", [131072, 50257])
def test_wide_rows(classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, classes + PADDING, generator=generator).bfloat16()
    check(row_step_triton, logits, torch.randint(0, classes, (64,), generator=generator), None, plain_terms())


@pytest.mark.gpu
def test_offsets_past_two_to_the_31() -> None:
    rows, classes = 20000, 131072
    logits = torch.zeros(rows, classes, dtype=torch.bfloat16, device="cuda")
    logits[-3:] = torch.randn(3, classes, device="cuda").bfloat16()
    last = logits[-3:].float().cpu()
    target = torch.arange(rows, device="cuda") % classes
    losses, dz, _ = exact(last, target[-3:].cpu(), None, plain_terms())
    made = row_step_triton(logits, target, None, plain_terms(), gradient=True)
    torch.testing.assert_close(made.losses[-3:].cpu().double(), losses, rtol=2e-6, atol=4e-6)
    torch.testing.assert_close(logits[-3:].cpu().double(), dz, rtol=1e-2, atol=1e-6)


def test_importing_the_row_step_does_not_import_triton() -> None:
    code = "import sys, structfly.lowering.linear_cross_entropy.rows_triton; sys.exit('triton' in sys.modules)"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0

"""Both row steps against the formulas, differentiated by autograd in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structfly.errors import UnsupportedError
from structfly.lowering.head.epilogue import parse_epilogue
from structfly.lowering.linear_divergence.reference import linear_divergence_reference
from structfly.lowering.linear_divergence.rows import KINDS, TEACHER_FORMS, RowStep, RowTerms
from structfly.lowering.linear_divergence.rows_aten import row_step_aten
from structfly.lowering.linear_divergence.rows_triton import row_step_triton
from tests.lowering.linear_divergence.cases import given_teacher

STEPS = [pytest.param(row_step_aten, id="aten"), pytest.param(row_step_triton, id="triton")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # without a GPU the kernel is interpreted
PADDING = 5
# The interpreter computes in numpy, which warns where a GPU does not.
INTERPRETED = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning")
EPILOGUES = ("", "mul:-0.5", "div:3.0,tanh,mul:3.0")
PLAIN = RowTerms(
    kind="forward_kl",
    beta=0.5,
    label_smoothing=0.0,
    epilogue=parse_epilogue(""),
    bias=None,
    teacher_form="logits",
    teacher_epilogue=parse_epilogue(""),
    teacher_bias=None,
    gradient_scale=1.0,
)


def exact(logits: Tensor, teacher: Tensor, coefficient: Tensor | None, terms: RowTerms) -> tuple[Tensor, Tensor]:
    """Losses and dz of the reference, in float64: a linear with the identity as weight makes z."""
    z = logits.double().requires_grad_()
    given = teacher.double()
    losses = linear_divergence_reference(
        z,
        torch.eye(z.shape[1], dtype=torch.float64),
        kind=terms.kind,
        bias=None if terms.bias is None else terms.bias.double(),
        epilogue=str(terms.epilogue),
        teacher=given if terms.teacher_bias is None else given + terms.teacher_bias.double(),
        teacher_form=terms.teacher_form,
        teacher_epilogue=str(terms.teacher_epilogue),
        beta=terms.beta,
        label_smoothing=terms.label_smoothing,
        reduction="none",
    )
    weight = torch.ones_like(losses) if coefficient is None else coefficient.double()
    losses = torch.where(weight != 0, losses, 0.0)
    (dz,) = torch.autograd.grad((losses * weight).sum(), z)
    return losses.detach(), dz


@st.composite
def row_problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None, RowTerms]:
    rows, classes = draw(st.integers(1, 3)), draw(st.sampled_from((1, 2, 7, 33, 127, 128, 129, 300)))
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    dtype, teacher_dtype = draw(st.sampled_from(dtypes)), draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    kind, form = draw(st.sampled_from(KINDS)), draw(st.sampled_from(TEACHER_FORMS))
    of_logits = form == "logits"
    chain = draw(st.sampled_from(EPILOGUES)) if of_logits else ""
    dead = 0 if kind == "reverse_kl" or chain or classes < 7 else draw(st.sampled_from((0, 2)))
    coefficient = torch.randn(rows, generator=generator) if draw(st.booleans()) else None
    if coefficient is not None and draw(st.booleans()):
        coefficient[0] = 0.0
    shift = torch.randn(classes, generator=generator).to(dtype) if of_logits and draw(st.booleans()) else None
    terms = RowTerms(
        kind=kind,
        beta=draw(st.sampled_from((0.5, 0.1, 0.9))),
        label_smoothing=draw(st.sampled_from((0.0, 0.1))) if kind == "cross_entropy" else 0.0,
        epilogue=parse_epilogue(draw(st.sampled_from(EPILOGUES))),
        bias=torch.randn(classes, generator=generator).to(dtype) if draw(st.booleans()) else None,
        teacher_form=form,
        teacher_epilogue=parse_epilogue(chain),
        teacher_bias=shift,
        gradient_scale=draw(st.sampled_from((1.0, 2.0**6 if dtype == torch.float16 else 0.5))),
    )
    logits = (torch.randn(rows, classes + PADDING, generator=generator) * 3).to(dtype)
    teacher = given_teacher(form, rows, classes, generator, dead).to(teacher_dtype)
    return logits, teacher, coefficient, terms


def on_device(value: Any) -> Any:
    return value.to(DEVICE) if isinstance(value, Tensor) else value


def check(step: RowStep, logits: Tensor, teacher: Tensor, coefficient: Tensor | None, terms: RowTerms) -> None:
    classes = logits.shape[1] - PADDING
    losses, dz = exact(logits[:, :classes], teacher, coefficient, terms)
    place = RowTerms(**{name: on_device(value) for name, value in vars(terms).items()})
    others = (on_device(teacher), on_device(coefficient), place)
    buffer = logits.clone().to(DEVICE)
    forward = step(buffer.clone()[:, :classes], *others, gradient=False)
    made = step(buffer[:, :classes], *others, gradient=True)
    assert torch.equal(forward, made)
    # log_p and log_q, of size up to about 20, are rounded to float32 before they are subtracted.
    torch.testing.assert_close(made.cpu().double(), losses, rtol=4e-6, atol=8e-6)
    rounding = torch.finfo(logits.dtype).eps
    scaled = dz * terms.gradient_scale
    torch.testing.assert_close(
        buffer[:, :classes].cpu().double(), scaled, rtol=rounding + 4e-5, atol=1e-5 * terms.gradient_scale
    )
    assert torch.equal(buffer[:, classes:].cpu(), logits[:, classes:]), "the padding was written"


@pytest.mark.parametrize("step", STEPS)
@INTERPRETED
@settings(max_examples=40)
@given(problem=row_problems())
def test_losses_and_gradients(step: RowStep, problem: tuple[Tensor, Tensor, Tensor | None, RowTerms]) -> None:
    check(step, *problem)


@pytest.mark.parametrize("step", STEPS)
@INTERPRETED
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["student", "teacher"])
def test_a_nan_is_kept(step: RowStep, kind: str, where: str) -> None:
    logits, teacher = torch.randn(1, 5, device=DEVICE), torch.randn(1, 5, device=DEVICE)
    (logits if where == "student" else teacher)[0, 2] = torch.nan
    assert step(logits, teacher, None, replace(PLAIN, kind=kind), gradient=True).isnan().all()
    assert logits.isnan().any()


@pytest.mark.parametrize("step", STEPS)
@INTERPRETED
@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_classes_that_both_rule_out_add_nothing(step: RowStep, kind: str) -> None:
    logits, teacher = torch.randn(2, 6, device=DEVICE), torch.randn(2, 6, device=DEVICE)
    inside = step(logits[:, :4].clone(), teacher[:, :4].contiguous(), None, replace(PLAIN, kind=kind), gradient=False)
    logits[:, 4:] = teacher[:, 4:] = -torch.inf
    losses = step(logits, teacher, None, replace(PLAIN, kind=kind), gradient=True)
    torch.testing.assert_close(losses, inside)
    assert not logits[:, 4:].any()


@pytest.mark.parametrize("step", STEPS)
def test_no_rows(step: RowStep) -> None:
    empty = torch.empty(0, 7, device=DEVICE)
    assert step(empty, empty.clone(), None, PLAIN, gradient=True).shape == (0,)


@pytest.mark.parametrize("place", [0, 1])
def test_triton_rows_refuse_float64(place: int) -> None:
    rows = [torch.empty(1, 3), torch.empty(1, 3)]
    rows[place] = rows[place].double()
    with pytest.raises(UnsupportedError, match="float64"):
        row_step_triton(rows[0], rows[1], None, PLAIN, gradient=False)


@pytest.mark.gpu
@pytest.mark.parametrize("classes", [16384, 50257])
@pytest.mark.parametrize("kind", KINDS)
def test_wide_rows(classes: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(16, classes + PADDING, generator=generator).bfloat16()
    check(row_step_triton, logits, torch.randn(16, classes, generator=generator), None, replace(PLAIN, kind=kind))

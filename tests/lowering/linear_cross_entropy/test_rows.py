"""Both row steps against the formulas, differentiated by autograd in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structfly.errors import UnsupportedError
from structfly.lowering.head.epilogue import parse_epilogue
from structfly.lowering.linear_cross_entropy import rows_triton
from structfly.lowering.linear_cross_entropy.row_program import RowLoss, parse_row_program
from structfly.lowering.linear_cross_entropy.rows import (
    ClassTerms,
    Coefficients,
    Indices,
    RowResults,
    RowStatistics,
    RowStep,
)
from structfly.lowering.linear_cross_entropy.rows_aten import row_step_aten
from structfly.lowering.linear_cross_entropy.rows_triton import row_step_triton
from tests.lowering.linear_cross_entropy.cases import EPILOGUES, epilogues, operands_of


def row_step_narrow(*arguments: Any, gradient: bool) -> RowResults:
    """The kernel with few classes at a time, so that a row takes several."""
    with patch.object(rows_triton, "launch_sizes", lambda classes: (64, 1)):
        return row_step_triton(*arguments, gradient=gradient)


STEPS = [
    pytest.param(row_step_aten, id="aten"),
    pytest.param(row_step_triton, id="triton"),
    pytest.param(row_step_narrow, id="triton, narrow"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # without a GPU the kernel is interpreted
PADDING = 5
# What to ask for: losses alone, which have a way of their own, and others.
ASKED: list[tuple[str, ...]] = [
    ("loss",),
    ("loss",),
    ("lse",),
    ("entropy",),
    ("argmax",),
    ("loss", "argmax"),
    ("lse", "chosen"),
]
ASKED += [("loss", "entropy"), ("entropy", "chosen"), RowStatistics._fields]
# The interpreter computes in numpy, which warns where a GPU does not.
INTERPRETED = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning")


class Problem(NamedTuple):
    """Arguments of a row step (the logits have a few columns more than classes, which must be left alone)."""

    logits: Tensor
    indices: Indices
    coefficients: Coefficients
    terms: ClassTerms
    asked: tuple[str, ...]


class Exact(NamedTuple):
    """Statistics, dz, the gradients of the operands that want one, and u, in float64."""

    statistics: RowStatistics
    dz: Tensor
    sums: list[Tensor]
    u: Tensor


def exact(problem: Problem) -> Exact:
    """The formulas, differentiated by autograd."""
    terms, (target, choices), coefficients = problem.terms, problem.indices, problem.coefficients
    z = problem.logits[:, : problem.logits.shape[1] - PADDING].double().requires_grad_()
    operands = [
        operand.double().requires_grad_() if want else operand.double() if operand.is_floating_point() else operand
        for operand, want in zip(terms.operands, terms.operand_gradients, strict=True)
    ]
    u = terms.epilogue.apply(z if terms.bias is None else z + terms.bias.double(), operands)
    lse, p = u.logsumexp(1), u.softmax(1)
    entropy = -(p * torch.where(p > 0, u - lse.unsqueeze(1), 0.0)).sum(1)
    chosen = None if choices is None else u.gather(1, choices)
    losses = None
    if target is not None:
        losses = F.cross_entropy(
            u,
            target,
            weight=None if terms.weight is None else terms.weight.double(),
            ignore_index=-1 if terms.ignore_index is None else terms.ignore_index,
            label_smoothing=terms.label_smoothing,
            reduction="none",
        )
        if problem.asked == ("loss",) and coefficients.loss_rows is not None:
            losses = torch.where(coefficients.loss_rows != 0, losses, 0.0)
    total = 0.0 * z.sum()
    for value, factor in zip((losses, lse, entropy, chosen), coefficients, strict=True):
        if value is not None and factor is not None:
            total = total + (value * (factor.double() if isinstance(factor, Tensor) else factor)).sum()
    leaves = [operand for operand in operands if operand.requires_grad]
    dz, *sums = torch.autograd.grad(total, [z, *leaves], materialize_grads=True)
    found = RowStatistics(losses, lse, entropy, u.argmax(1), chosen)
    values = {name: None if value is None else value.detach() for name, value in found._asdict().items()}
    return Exact(RowStatistics(**values), dz, sums, u.detach())


@st.composite
def row_problems(draw: st.DrawFn) -> Problem:
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
    mask = None
    if draw(st.booleans()) and not smoothing:  # a masked class under smoothing makes every loss infinite
        epilogue = ",".join(filter(None, (epilogue, f"where:class{len(operands)}:-inf")))
        operands.append(torch.rand(classes, generator=generator) < 0.8)
        mask = operands[-1]
        mask[target.clamp_min(0)] = True
        wanted.append(False)
    weight = torch.rand(classes, generator=generator) + 0.1 if draw(st.booleans()) else None

    def factors(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator)
        values[0] = values[0] if rows == 1 or draw(st.booleans()) else 0.0
        return values

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
    asked: tuple[str, ...] = draw(st.sampled_from(ASKED))
    names = [name for name in asked if name != "argmax"]
    choices = torch.randint(0, classes, (rows, 2), generator=generator) if "chosen" in names else None
    if choices is not None and mask is not None:  # a live class a row, so that no value is infinite
        choices = torch.where(mask[choices], choices, target.clamp_min(0).unsqueeze(1))
    given = {name for name in names if draw(st.integers(0, 3))}
    loss: Tensor | float | None = None
    if "loss" in given or asked == ("loss",):
        loss = factors(rows) if draw(st.booleans()) else 1.0
    coefficients = Coefficients(
        loss=loss,
        lse=factors(rows) if "lse" in given else None,
        entropy=factors(rows) if "entropy" in given else None,
        chosen=factors(rows, 2) if "chosen" in given else None,
    )
    return Problem(logits, Indices(target if "loss" in asked else None, choices), coefficients, terms, asked)


def on_device(value: Any) -> Any:
    return value.to(DEVICE) if isinstance(value, Tensor) else value


def terms_on_device(terms: ClassTerms) -> ClassTerms:
    moved = {name: on_device(value) for name, value in vars(terms).items()}
    return ClassTerms(**{**moved, "operands": tuple(map(on_device, terms.operands))})


def tuple_on_device(values: Any) -> Any:
    return type(values)(*map(on_device, values))


def assert_statistics(made: RowStatistics, true: Exact, asked: tuple[str, ...]) -> None:
    for name, value in made._asdict().items():
        assert (value is not None) == (name in asked), name
        if value is not None:
            mine, expected = value.cpu(), getattr(true.statistics, name)
            if name == "argmax":  # of logits that rounding made equal, any
                mine, expected = (true.u.gather(1, index.unsqueeze(1)) for index in (mine, expected))
            torch.testing.assert_close(mine.double(), expected, rtol=2e-6, atol=4e-6, equal_nan=True)


def assert_sums(made: RowResults, true: Exact, terms: ClassTerms) -> None:
    wanted = [operand for operand, want in enumerate(terms.operand_gradients) if want]
    for operand, share, expected in zip(wanted, made.operand_sums, true.sums, strict=True):
        whole = share.sum() if terms.epilogue.operands[operand].kind == "scalar" else share
        torch.testing.assert_close(whole.cpu().double(), expected, rtol=4e-5, atol=3e-5)


class Known:
    """A function of the rows whose derivatives are known."""

    group_rows = 1

    def __init__(self, coefficients: Coefficients, losses: Tensor) -> None:
        self.coefficients, self.losses = coefficients, losses

    def rows(self, part: slice) -> Known:
        return Known(self.coefficients.rows(part), self.losses[part])

    def differentiate(self, found: RowStatistics) -> tuple[Tensor, Coefficients]:
        assert found.lse is not None
        return self.losses, self.coefficients


def check(step: RowStep, problem: Problem) -> None:
    """Statistics alone, statistics with dz, and dz by coefficients that are only known once statistics are."""
    logits, indices, coefficients, terms, asked = problem
    classes = logits.shape[1] - PADDING
    true = exact(problem)
    place = terms_on_device(terms)
    indices, coefficients = tuple_on_device(indices), tuple_on_device(coefficients)
    buffers = [logits.clone().to(DEVICE) for _ in range(3)]
    forward = step(buffers[0][:, :classes], indices, coefficients, place, asked, gradient=False)
    assert_statistics(forward.statistics, true, asked)
    made = step(buffers[1][:, :classes], indices, coefficients, place, asked, gradient=True)
    assert_statistics(made.statistics, true, asked)
    losses = torch.arange(len(logits), device=DEVICE)
    more = tuple(dict.fromkeys(("lse", "entropy", *asked)))
    known = step(buffers[2][:, :classes], indices, Known(coefficients, losses), place, more, gradient=True)
    assert known.losses is not None
    assert torch.equal(known.losses, losses)
    rounding = torch.finfo(logits.dtype).eps
    for buffer, results in zip(buffers[1:], (made, known), strict=True):
        assert_sums(results, true, terms)
        torch.testing.assert_close(
            buffer[:, :classes].cpu().double(),
            true.dz * terms.gradient_scale,
            rtol=rounding + 4e-5,
            atol=6e-6 * terms.gradient_scale,
        )
        assert torch.equal(buffer[:, classes:].cpu(), logits[:, classes:]), "the padding was written"


@pytest.mark.parametrize("step", STEPS)
@INTERPRETED
@settings(max_examples=40)
@given(problem=row_problems())
def test_statistics_and_gradients(step: RowStep, problem: Problem) -> None:
    check(step, problem)


@pytest.mark.parametrize("step", STEPS[:2])
@INTERPRETED
def test_operands_of_every_kind_over_several_tiles(step: RowStep) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, classes = 13, 300
    epilogue = "mul:scalar0,add:class1,tanh,div:row2,sub:class3"
    terms = plain_terms(
        epilogue=parse_epilogue(epilogue),
        operands=tuple(operands_of(epilogue, rows, classes, generator, torch.float32)),
        operand_gradients=(True, True, True, True),
        ignore_index=-100,
    )
    target = torch.randint(0, classes, (rows,), generator=generator)
    target[7] = -100
    choices = torch.randint(0, classes, (rows, 2), generator=generator)
    shapes = ((rows,), (rows,), (rows,), (rows, 2))
    factors = Coefficients(*(torch.randn(shape, generator=generator) / 16 for shape in shapes))
    logits = torch.randn(rows, classes + PADDING, generator=generator)
    with patch.multiple(rows_triton, ROWS_A_SUM=8, _TILE_CLASSES=128):
        check(step, Problem(logits, Indices(target), Coefficients(factors.loss), terms, ("loss",)))
        check(step, Problem(logits, Indices(target, choices), factors, terms, ("loss", "lse", "entropy", "chosen")))


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
    made = step(
        logits.clone().to(DEVICE),
        Indices(target.to(DEVICE)),
        None,
        plain_terms(),
        ("loss", "lse", "argmax"),
        gradient=False,
    ).statistics
    assert made.loss is not None
    assert made.lse is not None
    assert made.argmax is not None
    loss = made.loss.cpu()
    torch.testing.assert_close(loss, reference, equal_nan=True)
    assert {"nan": loss.isnan(), "inf": loss.isinf(), "finite": loss.isfinite()}[expected].all()
    if not logits.isposinf().any() and not logits.isneginf().all():  # where a softmax has no value, lse may have one
        torch.testing.assert_close(made.lse.cpu(), logits.logsumexp(1), equal_nan=True)
    assert torch.equal(made.argmax.cpu(), logits.argmax(1))


@pytest.mark.parametrize("step", STEPS)
@INTERPRETED
@pytest.mark.parametrize("row", [[1.0, 3.0, 3.0, 2.0], [0.0] * 40, [2.0, float("nan"), 5.0, float("nan")]])
def test_argmax_is_the_first_as_on_cpus(step: RowStep, row: list[float]) -> None:
    logits = torch.tensor([row])
    made = step(logits.clone().to(DEVICE), Indices(None), None, plain_terms(), ("argmax",), gradient=False).statistics
    assert made.argmax is not None
    assert torch.equal(made.argmax.cpu(), logits.argmax(1))


@pytest.mark.parametrize("step", STEPS)
@INTERPRETED
def test_entropy_without_cancellation(step: RowStep) -> None:
    logits = torch.tensor([[1e4, 1e4 - 2.0, 1e4 - 20.0, -float("inf")], [0.0, -80.0, -90.0, -200.0]])
    made = step(logits.clone().to(DEVICE), Indices(None), None, plain_terms(), ("entropy",), gradient=False).statistics
    assert made.entropy is not None
    p = logits.double().softmax(1)
    torch.testing.assert_close(made.entropy.cpu().double(), torch.special.entr(p).sum(1), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("step", STEPS)
@INTERPRETED
@given(lead=st.floats(0.0, 16.0), level=st.floats(-1000.0, 1000.0), seed=st.integers(0, 99))
def test_the_loss_of_a_confident_row_is_as_exact_as_its_sum(
    step: RowStep, lead: float, level: float, seed: int
) -> None:
    """Its largest logit is the target's; how large that is, is no matter."""
    logits = torch.randn(3, 200, generator=torch.Generator().manual_seed(seed)).clamp(max=2.0) + level
    logits[:, 7] = 2.0 + level + lead
    target = torch.full((3,), 7)
    found = step(logits.clone().to(DEVICE), Indices(target.to(DEVICE)), None, plain_terms(), gradient=False)
    losses = F.cross_entropy(logits.double(), target, reduction="none")
    assert found.statistics.loss is not None
    torch.testing.assert_close(found.statistics.loss.cpu().double(), losses, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("step", STEPS)
@INTERPRETED
def test_a_row_without_coefficients_has_no_gradient_whatever_its_logits(step: RowStep) -> None:
    logits = torch.tensor([[1.0, float("nan"), 2.0], [1.0, 2.0, 3.0]], device=DEVICE)
    indices = Indices(*(torch.zeros(*shape, dtype=torch.int64, device=DEVICE) for shape in ((2,), (2, 1))))
    zeros = torch.tensor([0.0, 1.0], device=DEVICE)
    factors = Coefficients(zeros, zeros, zeros, zeros.unsqueeze(1))
    made = step(logits, indices, factors, plain_terms(), RowStatistics._fields, gradient=True).statistics
    assert made.lse is not None
    assert made.lse.isnan().tolist() == [True, False]
    assert logits[0].tolist() == [0.0, 0.0, 0.0]
    assert logits[1].isfinite().all()
    assert logits[1].any()


@pytest.mark.parametrize("step", STEPS)
def test_no_rows(step: RowStep) -> None:
    empty = torch.empty(0, 7, device=DEVICE)
    terms = plain_terms(
        epilogue=parse_epilogue("mul:scalar0,add:class1,div:row2"),
        operands=(torch.ones((), device=DEVICE), torch.ones(7, device=DEVICE), torch.ones(0, device=DEVICE)),
        operand_gradients=(True, True, True),
    )
    indices = Indices(torch.empty(0, dtype=torch.int64, device=DEVICE), torch.empty(0, 3, dtype=torch.int64))
    made = step(empty, indices, Coefficients(loss=1.0), terms, RowStatistics._fields, gradient=True)
    assert [None if part is None else part.shape for part in made.statistics] == [(0,)] * 4 + [(0, 3)]
    assert [part.shape for part in made.operand_sums] == [(0,), (7,), (0,)]
    assert not made.operand_sums[1].any()


@pytest.mark.parametrize("step", STEPS)
@INTERPRETED
@pytest.mark.parametrize("program", ["square lse", "neg loss;exp %0;mul %1 r0", "mul argmax r0", "sub entropy chosen0"])
def test_the_coefficients_of_programs(step: RowStep, program: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 40 + PADDING, generator=generator)
    indices = Indices(torch.tensor([3, 0, 39]), torch.tensor([[1], [5], [1]]))
    function = RowLoss(parse_row_program(program), (torch.tensor([0.5, -1.0, 2.0]),))
    asked = tuple(dict.fromkeys(("lse", *function.program.statistics)))
    place = tuple_on_device(indices)
    found = step(logits.clone().to(DEVICE)[:, :40], place, None, plain_terms(), asked, gradient=False).statistics
    losses, factors = function.differentiate(RowStatistics(*(v if v is None else v.cpu() for v in found)))
    on_place = RowLoss(function.program, tuple(map(on_device, function.operands)))
    buffer = logits.clone().to(DEVICE)
    made = step(buffer[:, :40], place, on_place, plain_terms(), asked, gradient=True)
    assert made.losses is not None
    torch.testing.assert_close(made.losses.cpu(), losses)
    true = exact(Problem(logits, indices, factors, plain_terms(), asked))
    torch.testing.assert_close(buffer[:, :40].cpu().double(), true.dz, rtol=4e-5, atol=6e-6)


def test_triton_rows_refuse_float64() -> None:
    with pytest.raises(UnsupportedError, match="float64"):
        row_step_triton(torch.empty(1, 3).double(), Indices(torch.tensor([0])), None, plain_terms(), gradient=False)


@pytest.mark.gpu
@pytest.mark.parametrize("classes", [131072, 50257])
def test_wide_rows(classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, classes + PADDING, generator=generator).bfloat16()
    target, choices = (torch.randint(0, classes, shape, generator=generator) for shape in ((64,), (64, 2)))
    factors = Coefficients(torch.ones(64), torch.ones(64), torch.ones(64), torch.ones(64, 2))
    check(row_step_triton, Problem(logits, Indices(target, choices), factors, plain_terms(), RowStatistics._fields))


@pytest.mark.gpu
def test_offsets_past_two_to_the_31() -> None:
    rows, classes = 20000, 131072
    logits = torch.zeros(rows, classes, dtype=torch.bfloat16, device="cuda")
    logits[-3:] = torch.randn(3, classes, device="cuda").bfloat16()
    last = logits[-3:].float().cpu()
    target = torch.arange(rows, device="cuda") % classes
    one = Coefficients(loss=1.0)
    true = exact(Problem(F.pad(last, (0, PADDING)), Indices(target[-3:].cpu()), one, plain_terms(), ("loss",)))
    made = row_step_triton(logits, Indices(target), one, plain_terms(), gradient=True).statistics.loss
    assert made is not None
    torch.testing.assert_close(made[-3:].cpu().double(), true.statistics.loss, rtol=2e-6, atol=4e-6)
    torch.testing.assert_close(logits[-3:].cpu().double(), true.dz, rtol=1e-2, atol=1e-6)


def test_importing_the_row_step_does_not_import_triton() -> None:
    code = "import sys, structfly.lowering.linear_cross_entropy.rows_triton; sys.exit('triton' in sys.modules)"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


@pytest.mark.parametrize(("divisor", "divides"), [(30.0, False), (-0.1, False), (1e-35, True), (1e35, True)])
def test_kernels_divide_only_where_a_reciprocal_leaves_float32(divisor: float, divides: bool) -> None:
    ((_, value, gradient, _),) = parse_epilogue(f"div:{divisor}").source()
    assert ("/" in str(value), "/" in str(gradient)) == (divides, divides)

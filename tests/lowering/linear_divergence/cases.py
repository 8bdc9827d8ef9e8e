"""Random calls of the op, for every test that needs one."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from structfly.lowering.head.linear import DIFFERENTIABLE
from structfly.lowering.linear_divergence.arguments import Arguments
from structfly.lowering.linear_divergence.op import linear_divergence
from structfly.lowering.linear_divergence.reference import linear_divergence_reference
from structfly.lowering.linear_divergence.rows import KINDS

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
EPILOGUES = ("", "div:2.0", "div:3.0,tanh,mul:3.0", "mul:-1.25", "add:0.5,sigmoid,mul:5.0,neg")
TEACHERS = ("head", "logits", "probabilities", "log_probabilities")


def given_teacher(form: str, rows: int, classes: int, generator: torch.Generator, dead: int = 0) -> Tensor:
    """(rows, classes) float32, in every row ``dead`` classes of probability 0; probabilities do not sum to 1."""
    logits = torch.randn(rows, classes, generator=generator) * 2
    if dead:
        logits[:, torch.randperm(classes, generator=generator)[:dead]] = -torch.inf
    if form == "logits":
        return logits
    probabilities = logits.softmax(1) * (torch.rand(rows, 1, generator=generator) + 0.5)
    return probabilities if form == "probabilities" else probabilities.log()


def make_call(
    *,
    rows: int = 13,
    hidden: int = 8,
    classes: int = 37,
    teacher_hidden: int = 5,
    dtype: torch.dtype = torch.float32,
    teacher_dtype: torch.dtype | None = None,
    teacher: str = "head",
    dead: int = 0,
    seed: int = 0,
    bias: bool = False,
    row_weight: bool = False,
    rank: int = 0,
    cut: int = 0,
    layout: str = "rows",
    frozen: frozenset[str] = frozenset(),
    device: str = "cpu",
    **options: Any,
) -> Arguments:
    """One call of the op on random tensors; ``options`` replaces any other argument."""
    generator = torch.Generator().manual_seed(seed)
    teacher_dtype = teacher_dtype or dtype
    num_classes = classes - cut

    def tensor(name: str, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_(name not in frozen)

    def fixed(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(teacher_dtype)

    given = None
    if teacher != "head":
        given = given_teacher(teacher, rows, num_classes, generator, dead).to(teacher_dtype)
        if layout == "columns":
            given = given.t().contiguous().t()
        elif layout == "one row":
            given = given[:1].expand(rows, -1)
    head = teacher == "head"
    call = Arguments(
        x=tensor("x", rows, hidden),
        weight=tensor("weight", classes, hidden),
        bias=tensor("bias", classes) if bias else None,
        adapter_x=tensor("adapter_x", rows, rank) if rank else None,
        adapter_weight=tensor("adapter_weight", classes, rank) if rank else None,
        adapter_scale=0.5,
        epilogue="",
        teacher=given,
        teacher_form="logits" if head else teacher,
        teacher_x=fixed(rows, teacher_hidden) if head else None,
        teacher_weight=fixed(classes + 2, teacher_hidden) if head else None,
        teacher_bias=fixed(classes + 2) if head and bias else None,
        teacher_epilogue="",
        row_weight=torch.rand(rows, generator=generator) if row_weight else None,
        num_classes=num_classes,
        kind="forward_kl",
        beta=0.3,
        label_smoothing=0.0,
        reduction="sum" if row_weight else "mean",
        loss_dtype=torch.float64 if dtype == torch.float64 else torch.float32,
        gradients=(),
        schedule="forward",
        workspace=2**20,
        autocast=True,
    )
    call = call._replace(**options)
    moved: dict[str, Any] = {
        name: value.detach().to(device).requires_grad_(value.requires_grad)
        for name, value in call._asdict().items()
        if isinstance(value, Tensor)
    }
    call = call._replace(**moved)
    if call.reduction == "none":
        call = call._replace(schedule="backward")
    wanted = [getattr(call, name) is not None and getattr(call, name).requires_grad for name in DIFFERENTIABLE]
    return call._replace(gradients=wanted)


@st.composite
def calls(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Arguments:
    """Random kinds, teachers, shapes, dtypes, options and chunk lengths."""
    dtype, kind = draw(st.sampled_from(dtypes)), draw(st.sampled_from(KINDS))
    teacher = draw(st.sampled_from(TEACHERS))
    classes = draw(st.integers(2, 70))
    reduction = draw(st.sampled_from(("mean", "sum", "none")))
    row_weight = reduction == "sum" and draw(st.booleans())
    other = draw(st.sampled_from((dtype, torch.float32)))
    call = make_call(
        rows=draw(st.integers(0, 30)),
        hidden=draw(st.integers(1, 9)),
        teacher_hidden=draw(st.integers(1, 9)),
        classes=classes,
        cut=draw(st.integers(0, min(3, classes - 2))),
        dtype=dtype,
        teacher_dtype=dtype if dtype == torch.float64 else other,
        teacher=teacher,
        # A class that the teacher rules out makes a reverse divergence infinite.
        dead=0 if kind == "reverse_kl" else draw(st.integers(0, 1)),
        seed=draw(st.integers(0, 2**16)),
        bias=draw(st.booleans()),
        row_weight=row_weight,
        rank=draw(st.sampled_from((0, 0, 2))),
        layout=draw(st.sampled_from(("rows", "columns", "one row"))),
        frozen=frozenset(draw(st.sets(st.sampled_from(DIFFERENTIABLE), max_size=2))),
        kind=kind,
        beta=draw(st.sampled_from((0.5, 0.1, 0.9))),
        epilogue=draw(st.sampled_from(EPILOGUES)),
        teacher_epilogue=draw(st.sampled_from(EPILOGUES)) if teacher in ("head", "logits") else "",
        label_smoothing=draw(st.sampled_from((0.0, 0.1))) if kind == "cross_entropy" else 0.0,
        reduction=reduction,
        schedule=draw(st.sampled_from(("forward", "backward"))),
        workspace=draw(st.integers(1, 50)) * 160 * dtype.itemsize,
    )
    if call.teacher is not None and call.teacher_epilogue not in ("", "div:2.0"):  # what -inf becomes something else in
        call = call._replace(teacher=call.teacher.clamp_min(-50.0))
    if call.row_weight is not None and draw(st.booleans()):
        call.row_weight[: call.row_weight.shape[0] // 2] = 0.0
    return call


def run(call: Arguments, *leaves: Tensor) -> Tensor:
    """The op's loss, its differentiable tensors replaced by ``leaves`` (those that are not None, in order)."""
    return linear_divergence(*with_leaves(call, leaves))[0]


def run_reference(call: Arguments, *leaves: Tensor) -> Tensor:
    """The reference's loss in the leaves' dtype, as float32 at least."""
    call = with_leaves(call, leaves)
    skipped = ("loss_dtype", "gradients", "schedule", "workspace", "autocast")
    options: dict[str, Any] = {name: value for name, value in call._asdict().items() if name not in skipped}
    for name in ("row_weight", "teacher", "teacher_x", "teacher_weight", "teacher_bias"):
        if options[name] is not None and call.x.dtype == torch.float64:
            options[name] = options[name].double()
    loss = linear_divergence_reference(**options)
    return loss if loss.dtype == torch.float64 else loss.to(call.loss_dtype)


def leaves_of(call: Arguments) -> list[Tensor]:
    """The differentiable tensors that are there, in order."""
    return [tensor for name in DIFFERENTIABLE if (tensor := getattr(call, name)) is not None]


def with_leaves(call: Arguments, leaves: tuple[Tensor, ...]) -> Arguments:
    """The call with its differentiable tensors replaced."""
    names = [name for name in DIFFERENTIABLE if getattr(call, name) is not None]
    replaced: dict[str, Any] = dict(zip(names, leaves, strict=True))
    return call._replace(**replaced)

"""Distillation through the backend: Inductor, dtypes, autocast, dynamic shapes, what is computed, random programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structfly.backend import read_config, rewrite
from structfly.lowering.linear_divergence.arguments import Arguments
from tests.compiling import ALWAYS, Rewritten
from tests.oracle import assert_like_eager

OP = torch.ops.structfly.linear_divergence_v1.default
BATCH, LENGTH, HIDDEN, WIDTH, CLASSES = 3, 4, 6, 5, 23


def inputs(dtype: torch.dtype = torch.float32, length: int = LENGTH) -> list[Tensor]:
    """Student's x and w, teacher's y and u."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((BATCH, length, HIDDEN), (CLASSES, HIDDEN), (BATCH, length, WIDTH), (CLASSES, WIDTH))
    x, w, y, u = (torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)
    return [x.requires_grad_(), w.requires_grad_(), y, u]


def distilled(x: Tensor, w: Tensor, y: Tensor, u: Tensor) -> Tensor:
    with torch.no_grad():
        teacher = F.linear(y, u) / 2.0
    student = F.linear(torch.tanh(x), w) / 2.0
    kl = F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="none").sum(-1)
    return kl.mean() * 4.0


def jensen_shannon(x: Tensor, w: Tensor, y: Tensor, u: Tensor) -> Tensor:
    log_p, log_q = F.linear(x, w).log_softmax(-1), F.linear(y, u).log_softmax(-1)
    beta = torch.tensor(0.3, dtype=log_p.dtype)
    log_m = torch.logsumexp(torch.stack([log_p + torch.log(1 - beta), log_q + torch.log(beta)]), dim=0)
    of_teacher = F.kl_div(log_m, log_q, reduction="none", log_target=True)
    of_student = F.kl_div(log_m, log_p, reduction="none", log_target=True)
    return (beta * of_teacher + (1 - beta) * of_student).sum() / x.shape[0]


def per_token(x: Tensor, w: Tensor, y: Tensor, u: Tensor) -> Tensor:
    q = F.linear(y, u).softmax(-1)
    return -(q * F.linear(x, w).log_softmax(-1)).sum(-1)


# Inductor's compile workers and torch's own deprecations warn.
@pytest.mark.filterwarnings("ignore")
def test_inductor_runs_it_as_accurately_as_eager() -> None:
    torch._dynamo.reset()
    options: Any = {"rewrite": "always"}
    assert_like_eager(torch.compile(jensen_shannon, backend="structfly", options=options), jensen_shannon, inputs())


@pytest.mark.parametrize(
    ("loss", "dtype"),
    [
        (distilled, torch.bfloat16),
        (distilled, torch.float16),
        (jensen_shannon, torch.float64),
        (jensen_shannon, torch.bfloat16),
        (per_token, torch.float16),
    ],
)
def test_dtypes(loss: Callable[..., Tensor], dtype: torch.dtype) -> None:
    fast = Rewritten(loss, then="aot_eager")
    assert_like_eager(fast, loss, inputs(dtype), dtype)
    assert fast.statuses == ["rewritten"]


@pytest.mark.parametrize("loss", [distilled, per_token])
def test_one_graph_for_all_lengths(loss: Callable[..., Tensor]) -> None:
    fast = Rewritten(loss, then="aot_eager", dynamic=True)
    for length in (4, 7, 9):
        assert_like_eager(fast, loss, inputs(length=length))
    assert fast.statuses == ["rewritten"]
    assert len(fast.graphs) == 1


def test_under_autocast_the_products_run_in_its_dtype() -> None:
    def step(x: Tensor, w: Tensor, y: Tensor, u: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return distilled(x, w, y, u)

    fast = Rewritten(step, then="aot_eager")
    x, w, y, u = inputs()
    loss, eager = fast(x, w, y, u), step(x, w, y, u)
    assert loss.dtype == eager.dtype
    (node,) = fast.calls_of(OP)
    arguments: Any = node.args
    call: Any = Arguments(*arguments)
    assert call.x.meta["example_value"].dtype == call.teacher_x.meta["example_value"].dtype == torch.bfloat16
    for mine, theirs in zip(torch.autograd.grad(loss, [x, w]), torch.autograd.grad(eager, [x, w]), strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=5e-2, atol=2e-3)


@pytest.mark.parametrize(
    ("frozen", "gradients"),
    [((), [True, True]), ((1,), [True, False]), ((0, 1), [False, False])],
)
def test_only_wanted_gradients_are_made(frozen: tuple[int, ...], gradients: list[bool]) -> None:
    tensors = inputs()
    for place in frozen:
        tensors[place].requires_grad_(False)
    fast = Rewritten(distilled, then="aot_eager")
    assert_like_eager(fast, distilled, tensors)
    (node,) = fast.calls_of(OP)
    arguments: Any = node.args
    assert Arguments(*arguments).gradients[:2] == gradients


def test_a_teacher_with_trainable_parameters_under_no_grad_gets_no_gradient() -> None:
    x, w, y, u = inputs()
    fast = Rewritten(distilled, then="aot_eager")
    fast(x, w, y, u.requires_grad_()).backward()
    assert fast.statuses == ["rewritten"]
    assert u.grad is None or not u.grad.any()
    assert x.grad is not None


def test_a_hard_loss_on_the_same_logits_leaves_both_alone() -> None:
    def step(x: Tensor, w: Tensor, y: Tensor, u: Tensor) -> Tensor:
        z = F.linear(x, w).flatten(0, 1)
        soft = F.kl_div(z.log_softmax(-1), F.linear(y, u).flatten(0, 1).softmax(-1), reduction="batchmean")
        return soft + F.cross_entropy(z, torch.zeros(z.shape[0], dtype=torch.int64))

    fast = Rewritten(step)
    assert_like_eager(fast, step, inputs())
    assert fast.statuses == ["missed", "missed"]
    assert all("must exist" in site.reason for site in fast.sites)


# ------------------------------------------------------------------------------------------ random programs

LINEARS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": F.linear,
    "matmul": lambda x, w: x @ w.T,
    "einsum": lambda x, w: torch.einsum("...h,vh->...v", x, w),
}
BETWEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda z: z,
    "temperature": lambda z: z / 2.5,
    "capped": lambda z: torch.tanh(z / 3.0) * 3.0,
    "flat": lambda z: z.reshape(-1, CLASSES),
    "shifted": lambda z: z[:, :-1],
    "time first": lambda z: z.transpose(0, 1).contiguous(),
    "cut": lambda z: z[..., :20],
    "wide": lambda z: z.double().float(),
}
DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward": lambda z, t: F.kl_div(z.log_softmax(-1), t.softmax(-1), reduction="none"),
    "forward, logs": lambda z, t: F.kl_div(z.log_softmax(-1), t.log_softmax(-1), reduction="none", log_target=True),
    "forward, written out": lambda z, t: t.softmax(-1) * (t.log_softmax(-1) - z.log_softmax(-1)),
    "reverse": lambda z, t: F.kl_div(t.log_softmax(-1), z.log_softmax(-1), reduction="none", log_target=True),
    "reverse, written out": lambda z, t: z.softmax(-1) * (z.log_softmax(-1) - t.log_softmax(-1)),
    "cross-entropy": lambda z, t: -t.softmax(-1) * z.log_softmax(-1),
    "shannon": lambda z, t: shannon(z.softmax(-1), t.softmax(-1)),
    "no divergence": lambda z, t: t.softmax(-1) * (z.log_softmax(-1) + t.log_softmax(-1)),
}
ENDS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda e: e.sum(-1),
    "rows kept": lambda e: e.sum(-1, keepdim=True) * 2,
    "sum": lambda e: e.sum() * 0.25,
    "mean": lambda e: e.mean(),
    "weighted": lambda e: (e.sum(-1) * torch.linspace(-1.0, 1.0, e.shape[-2])).mean(),
    "weighted first": lambda e: (e * torch.linspace(0.0, 1.0, e.shape[-2]).unsqueeze(-1)).sum(),
    "by class": lambda e: (e * torch.linspace(0.0, 1.0, e.shape[-1])).sum(),
    "over rows": lambda e: e.sum(0).mean(),
}


def shannon(p: Tensor, q: Tensor) -> Tensor:
    log_m = (0.25 * q + 0.75 * p).log()
    return 0.75 * F.kl_div(log_m, p, reduction="none") + 0.25 * F.kl_div(log_m, q, reduction="none")


@st.composite
def programs(draw: st.DrawFn) -> Callable[..., Tensor]:
    def pick(table: dict[str, Any]) -> Any:
        return table[draw(st.sampled_from(sorted(table)))]

    linear, of_teacher, between = pick(LINEARS), pick(LINEARS), pick(BETWEEN)
    divergence, end = pick(DIVERGENCES), pick(ENDS)
    extra = draw(st.sampled_from(("none", "teacher", "logits", "overwritten", "given")))

    def program(x: Tensor, w: Tensor, y: Tensor, u: Tensor) -> Tensor:
        teacher = of_teacher(y, u)
        z, t = between(linear(x, w)), between(teacher)
        if extra == "given":
            t = t.cumsum(-1) * 0.1
        elif extra == "overwritten":
            t = t * 1.0
            t[..., 0] = 1.0
        loss = end(divergence(z, t))
        if extra == "teacher":
            loss = loss + teacher.square().mean()
        elif extra == "logits":
            loss = loss + z.mean()
        result: Tensor = loss
        return result

    return program


# Dynamo evaluates some of torch's deprecated helpers.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@settings(max_examples=15)
@given(program=programs())
def test_any_program_keeps_its_values(program: Callable[..., Tensor]) -> None:
    fast = Rewritten(program)
    assert_like_eager(fast, program, inputs(), roundings=64)
    for site in fast.sites:
        assert site.status in ("rewritten", "missed")
        assert site.reason
    assert len(fast.calls_of(OP)) == fast.statuses.count("rewritten")
    for gm in fast.graphs:  # a second run finds nothing more to do
        assert not rewrite(gm, read_config(ALWAYS)).changed

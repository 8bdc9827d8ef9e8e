"""Random consumers of one head's logits, after random chains and joined in random ways: values and gradients stay."""

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
from tests.compiling import ALWAYS, Rewritten
from tests.oracle import assert_like_eager

BATCH, LENGTH, HIDDEN, CLASSES = 3, 4, 6, 23


def log_p(z: Tensor, t: Tensor) -> Tensor:
    return z.log_softmax(-1).gather(-1, t.unsqueeze(-1)).squeeze(-1)


def entropy(z: Tensor) -> Tensor:
    return z.logsumexp(-1) - (z.softmax(-1) * z).sum(-1)


# One number a token (B, T), or a scalar.
CONSUMERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "log-probability": lambda z, t, u: log_p(z, t),
    "cross-entropy of tokens": lambda z, t, u: F.cross_entropy(z.transpose(1, 2), t, reduction="none"),
    "of other tokens": lambda z, t, u: log_p(z, u),
    "smoothed mean": lambda z, t, u: F.cross_entropy(z.view(-1, CLASSES), t.view(-1), label_smoothing=0.1),
    "sum": lambda z, t, u: F.cross_entropy(z.flatten(0, 1), t.flatten(), ignore_index=3, reduction="sum"),
    "logsumexp": lambda z, t, u: z.logsumexp(-1),
    "entropy": lambda z, t, u: entropy(z),
    "chosen logit": lambda z, t, u: z.gather(2, t.unsqueeze(2)).squeeze(2),
    "hits": lambda z, t, u: (z.argmax(-1) == t).to(z.dtype),
}
# From the linear's value to the logits, with a learned number, one a token (B, T, 1), and one a class.
CHAINS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "none": lambda z, one, row, each: z,
    "capped": lambda z, one, row, each: torch.tanh(z / 3.0) * 3.0,
    "scaled": lambda z, one, row, each: z * torch.sigmoid(one),
    "temperatures": lambda z, one, row, each: z / (row.square() + 1.0),
    "shifted and capped": lambda z, one, row, each: 4.0 * torch.sigmoid(z * row + each) - one,
    "bounded by class": lambda z, one, row, each: torch.where(each > -0.5, z.clamp(-2.5, 2.5), one) * 0.8,
}
POINTWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "as it is": lambda v, m: v,
    "halved": lambda v, m: -v / 2,
    "bounded": lambda v, m: torch.sigmoid(v),
    "squared": lambda v, m: v.square() * 0.1,
    "masked": lambda v, m: torch.where(m > 0.5, v, 0.0) if v.ndim else v,
    "weighted": lambda v, m: v * m[0] if v.ndim else v * m[0, 0],
    "clipped": lambda v, m: torch.min(v * 0.7, v.clamp(-1.0, 1.0)),
    "less itself": lambda v, m: torch.tanh(v - v.detach()) + 1,
    "detached": lambda v, m: v.detach(),
}
REDUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": lambda v, m: v.mean(),
    "masked mean": lambda v, m: (v * m).sum() / m.sum() if v.ndim else v,
    "mean of sums": lambda v, m: (v.sum(-1) / m.sum(-1)).mean() if v.ndim else v,
    "of groups": lambda v, m: F.softplus(v.sum(-1) * 0.1).sum() if v.ndim else v,
    "none": lambda v, m: v,
}
# What jumps, or has a slope that does: in 16 bits values round across the jump in one computation and not in the other.
JUMPS = {"hits", "clipped", "bounded by class"}
JOINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda a, b: a + b,
    "difference": lambda a, b: a - 0.3 * b,
    "product": lambda a, b: a * torch.tanh(b),
}


@st.composite
def programs(draw: st.DrawFn, dtype: torch.dtype) -> Callable[..., Tensor]:
    left_out = JUMPS if dtype.itemsize == 2 else set()
    names = draw(st.lists(st.sampled_from(sorted(CONSUMERS.keys() - left_out)), min_size=1, max_size=4))
    pointwise = [draw(st.sampled_from(sorted(POINTWISE.keys() - left_out))) for _ in names]
    early = [draw(st.booleans()) for _ in names]
    reductions = [draw(st.sampled_from(sorted(REDUCTIONS))) for _ in names]
    joins = [draw(st.sampled_from(sorted(JOINS))) for _ in names]
    chain = draw(st.sampled_from(sorted(CHAINS.keys() - left_out)))
    last = draw(st.sampled_from(("mean", "masked mean", "none")))
    logged = draw(st.booleans())

    def program(
        x: Tensor, w: Tensor, b: Tensor, one: Tensor, row: Tensor, each: Tensor, m: Tensor, t: Tensor
    ) -> Tensor:
        u = (t + 1) % CLASSES
        z = CHAINS[chain](F.linear(x, w, b), one, row, each)
        total: Tensor | None = None
        for name, change, first, reduction, join in zip(names, pointwise, early, reductions, joins, strict=True):
            value = POINTWISE[change](CONSUMERS[name](z, t, u), m)
            if first:
                value = REDUCTIONS[reduction](value, m)
            total = value if total is None else JOINS[join](total, value)
        assert total is not None
        total = REDUCTIONS[last](total, m) if total.ndim else total
        if logged:
            with torch.no_grad():
                total = total + CONSUMERS[names[0]](z, t, u).mean()
        # Terms of both signs may all but cancel: the rounding of a partial sum s, half an ulp of s in each addition,
        # whatever made its terms, has no bound relative to what is left.  Beside ones, the values are held to the
        # terms' own order of size.
        return torch.cat([total.flatten(), torch.ones_like(total).flatten()])

    return program


# Dynamo evaluates some of torch's deprecated helpers.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@settings(max_examples=20)
@given(data=st.data(), dtype=st.sampled_from((torch.float32, torch.float32, torch.float16, torch.bfloat16)))
def test_any_consumers_keep_their_values(data: st.DataObject, dtype: torch.dtype) -> None:
    program, seed = data.draw(programs(dtype)), data.draw(st.integers(0, 99))
    generator = torch.Generator().manual_seed(seed)
    shapes = ((BATCH, LENGTH, HIDDEN), (CLASSES, HIDDEN), (CLASSES,), (), (BATCH, LENGTH, 1), (CLASSES,))
    leaves = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    m = torch.rand(BATCH, LENGTH, generator=generator).to(dtype)
    t = torch.randint(0, CLASSES, (BATCH, LENGTH), generator=generator)
    fast = Rewritten(program)
    arguments: tuple[Any, ...] = (*leaves, m, t)
    assert_like_eager(fast, program, arguments, dtype)
    twice = all("more than one with class weights or label smoothing" in site.reason for site in fast.sites)
    assert twice or fast.statuses == ["rewritten"], fast.sites
    for gm in fast.graphs:  # a second run finds nothing more to do
        assert not rewrite(gm, read_config(ALWAYS)).changed

"""Random programs around a head: whatever the engine decides, values and gradients stay eager's."""

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

BODIES: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda x: x,
    "tanh": torch.tanh,
    "residual": lambda x: x + torch.sigmoid(x),
    "transposed twice": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}
LINEARS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w, b: F.linear(x, w, b),
    "matmul": lambda x, w, b: x @ w.T,
    "added bias": lambda x, w, b: torch.matmul(x, w.t()) + b,
    "einsum": lambda x, w, b: torch.einsum("...h,vh->...v", x, w),
}
# Of (B, T, C) logits, (B, T, H) hidden states and (C,) numbers.
EPILOGUES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "none": lambda z, x, b: z,
    "scaled": lambda z, x, b: z / 2.5,
    "capped": lambda z, x, b: torch.tanh(z / 3.0) * 3.0,
    "cloned": lambda z, x, b: z.clone() * -0.5,
    "relu": lambda z, x, b: F.relu(z),
    "learned scale": lambda z, x, b: z * b[0].exp(),
    "sigmoid cap": lambda z, x, b: 5 * torch.sigmoid((z + 1) / 2.0) - b,
    "temperature": lambda z, x, b: z / (x.square().sum(-1, keepdim=True) + 1.0),
    "sequence filled": lambda z, x, b: torch.where(x[:, :1, :1] > 0, z.clamp(-2.0, 2.0), b[1]),
}
# Views of (B, T, C) logits beside the same of (B, T) labels.
VIEWS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "none": (lambda z: z, lambda t: t),
    "shift": (lambda z: z[..., :-1, :], lambda t: t[..., 1:]),
    "first rows": (lambda z: z[:2], lambda t: t[:2]),
    "every other token": (lambda z: z[:, ::2], lambda t: t[:, ::2]),
    "time first": (lambda z: z.transpose(0, 1), lambda t: t.transpose(0, 1)),
    "one sequence": (lambda z: z.select(0, 1).unsqueeze(0), lambda t: t[1:2]),
    "chosen": (lambda z: z[torch.tensor([2, 0])], lambda t: t[torch.tensor([2, 0])]),
}
LAYOUTS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "flat": lambda z, t: (z.reshape(-1, CLASSES), t.reshape(-1)),
    "flatten": lambda z, t: (z.flatten(0, 1), t.flatten()),
    "classes second": lambda z, t: (z.movedim(-1, 1), t),
}


def end(kind: str, z: Tensor, t: Tensor, options: dict[str, Any]) -> Tensor:
    if kind == "cross_entropy":
        return F.cross_entropy(z, t, **options)
    if kind == "nll_loss":
        return F.nll_loss(F.log_softmax(z, 1), t, reduction=options["reduction"])
    if kind == "difference":
        log_p = z.gather(1, t.clamp_min(0).unsqueeze(1)).squeeze(1) - z.logsumexp(1)
        return -log_p.mean() if options["reduction"] == "mean" else log_p
    losses = F.cross_entropy(z, t, **{**options, "reduction": "none"})
    return (losses * (t != 3)).sum() / (t >= 0).sum().clamp_min(1)


@st.composite
def programs(draw: st.DrawFn) -> Callable[..., Tensor]:
    body, linear = BODIES[draw(st.sampled_from(sorted(BODIES)))], LINEARS[draw(st.sampled_from(sorted(LINEARS)))]
    epilogue, layout = (
        EPILOGUES[draw(st.sampled_from(sorted(EPILOGUES)))],
        LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))],
    )
    rows, labels = VIEWS[draw(st.sampled_from(sorted(VIEWS)))]
    kind = draw(st.sampled_from(("cross_entropy", "nll_loss", "difference", "masked")))
    extra = draw(st.sampled_from(("none", "hidden", "logits", "second loss", "overwritten", "autocast")))
    options = {
        "reduction": draw(st.sampled_from(("mean", "sum", "none"))),
        "label_smoothing": draw(st.sampled_from((0.0, 0.1))),
    }

    def program(x: Tensor, w: Tensor, b: Tensor, t: Tensor) -> Tensor:
        hidden = body(x)
        if extra == "overwritten":  # what eager allows only where nothing is differentiated
            with torch.no_grad():
                hidden = hidden.clone()
                logits = linear(hidden, w, b)
                hidden.transpose(0, 1)[1:] *= 3.0
                return end(kind, *layout(rows(epilogue(logits, x, b)), labels(t)), options)
        logits = linear(hidden, w, b)
        with torch.autocast("cpu", torch.bfloat16, enabled=extra == "autocast"):  # of the loss, not of the linear
            loss = end(kind, *layout(rows(epilogue(logits, x, b)), labels(t)), options)
        if extra == "hidden":
            loss = loss + hidden.square().mean()
        elif extra == "logits":
            loss = loss + logits[0, 0, 0]
        elif extra == "second loss":
            loss = loss + F.cross_entropy(F.linear(x, w).view(-1, CLASSES), t.view(-1)) * 0.5
        return loss

    return program


# Dynamo evaluates some of torch's deprecated helpers.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@settings(max_examples=80)
@given(program=programs(), seed=st.integers(0, 99))
def test_any_program_keeps_its_values(program: Callable[..., Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, w, b = (
        torch.randn(*shape, generator=generator).requires_grad_()
        for shape in ((BATCH, LENGTH, HIDDEN), (CLASSES, HIDDEN), (CLASSES,))
    )
    t = torch.randint(0, CLASSES, (BATCH, LENGTH), generator=generator)
    t[0, 1] = -100
    fast = Rewritten(program)
    assert_like_eager(fast, program, (x, w, b, t))
    assert fast.sites
    for site in fast.sites:
        assert site.status in ("rewritten", "missed")
        assert site.reason
    assert len(fast.calls) == fast.statuses.count("rewritten")
    for gm in fast.graphs:  # a second run finds nothing more to do
        assert not rewrite(gm, read_config(ALWAYS)).changed

"""Random calls of heads that the schemes of generated products serve, and what they are held against."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st

from structfly.lowering.head.epilogue import parse_epilogue
from structfly.lowering.linear_cross_entropy.arguments import Arguments
from structfly.lowering.linear_cross_entropy.op import linear_cross_entropy
from tests.lowering.linear_cross_entropy.cases import (
    EPILOGUES,
    epilogues,
    leaves_of,
    make_call,
    run,
    run_reference,
)
from tests.oracle import assert_like_eager, errors, in_float64, value_and_gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def served(**options: Any) -> Arguments:
    """A call in bfloat16; ``scheme`` and what is not as in make_call's defaults are named."""
    return make_call(**{"dtype": torch.bfloat16, "device": DEVICE, "hidden": 16, **options})


def check(call: Arguments) -> None:
    """It is as accurate as eager."""
    shape = call.x.shape[:1] if call.reduction == "none" else ()
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    assert_like_eager(
        partial(run, call), partial(run_reference, call), leaves_of(call), torch.bfloat16, upstream, roundings=1
    )


def check_rounding(call: Arguments) -> None:
    """Its gradients are little more than rounded, where many rows share a target, as frequent tokens do, and the
    targets' terms make up most of both."""
    assert call.target is not None
    call.target.copy_(torch.where(call.target >= 0, call.target % 24, call.target))
    exact = value_and_gradients(partial(run_reference, call), [in_float64(leaf) for leaf in leaves_of(call)])[1]
    for made, wanted in zip(value_and_gradients(partial(run, call), leaves_of(call))[1], exact, strict=True):
        assert made is not None
        assert wanted is not None
        rounding = errors(wanted.bfloat16(), wanted)[0] if wanted.ndim else 2.0**-8  # one number may have none by luck
        assert errors(made, wanted)[0] <= 1.05 * rounding


def check_overflow(call: Arguments, scale: float) -> None:
    """It is as accurate as eager where some rows' logits are so much larger."""
    with torch.no_grad():
        call.x[10:13] *= scale
    check(call)


def check_transposed(call: Arguments) -> None:
    """It is as accurate as eager with hidden states that lie transposed."""
    check(call._replace(x=call.x.detach().t().contiguous().t().requires_grad_()))


def check_same_bits(call: Arguments) -> None:
    """It gives the same every time."""
    for first, second in zip(linear_cross_entropy(*call)[:-1], linear_cross_entropy(*call)[:-1], strict=True):
        assert torch.equal(first, second)


@st.composite
def calls(draw: st.DrawFn, scheme: str, workspaces: st.SearchStrategy[int], classes: int = 100) -> Arguments:
    """Random shapes, options and workspaces, with up to so many classes; what blocks do not serve for exponentials."""
    blocks = scheme == "blocks"
    reduction = draw(st.sampled_from(("mean", "sum", "none")))
    transposed = draw(st.booleans())
    count = draw(st.integers(1, classes // 8)) * 8 if transposed else draw(st.integers(2, classes))
    bias = draw(st.booleans())
    epilogue = draw(st.sampled_from(EPILOGUES) if blocks else st.sampled_from(EPILOGUES) | epilogues(torch.bfloat16))
    mask, chain = draw(st.booleans()), parse_epilogue(epilogue)
    frozen = draw(st.sets(st.sampled_from(("x", "weight", "bias", "operands")), max_size=3))
    frozen |= {"operands"} if chain.of_classes_after_leading([True] * len(chain.operands)) else set()
    smoothing = draw(st.sampled_from((0.0, 0.1, 1.0))) if not mask and chain.linear else 0.0
    return served(
        scheme=scheme,
        rows=draw(st.integers(0, 40)),
        hidden=8 * draw(st.integers(1, 5)),
        classes=count,
        cut=draw(st.integers(0, min(3, count - 2))),
        seed=draw(st.integers(0, 2**16)),
        bias=bias,
        class_weight=draw(st.booleans()),
        row_weight=reduction == "sum" and draw(st.booleans()),
        class_mask=mask,
        label_smoothing=smoothing,
        ignored=draw(st.sampled_from((0.0, 0.3, 1.0))),
        frozen=frozenset(frozen),
        transposed=transposed,
        epilogue=epilogue,
        reduction=reduction,
        ignore_index=draw(st.sampled_from((-100, 0, None))),
        schedule=draw(st.sampled_from(("forward", "backward"))),
        workspace=draw(workspaces),
    )

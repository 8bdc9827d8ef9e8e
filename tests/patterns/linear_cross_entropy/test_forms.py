"""Every form matches and is as accurate as eager; every near miss says why it does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.compiling import Rewritten
from tests.oracle import assert_like_eager
from tests.patterns.linear_cross_entropy.forms import FORMS, NEAR_MISSES

BATCH, LENGTH, HIDDEN, CLASSES = 3, 5, 8, 37


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, LENGTH, HIDDEN, generator=generator).to(dtype).requires_grad_()
    w = torch.randn(CLASSES, HIDDEN, generator=generator).to(dtype).requires_grad_()
    b = torch.randn(CLASSES, generator=generator).to(dtype).requires_grad_()
    ids = torch.randint(0, CLASSES, (BATCH, LENGTH), generator=generator)
    labels = ids.masked_fill(torch.rand(BATCH, LENGTH, generator=generator) < 0.2, -100)
    return x, w, b, ids, labels


@pytest.mark.parametrize("name", FORMS)
def test_form_is_rewritten_and_exact(name: str) -> None:
    form = FORMS[name]
    fast = Rewritten(form.function, then="aot_eager")  # traced forward and backward, as by Inductor
    assert_like_eager(fast, form.function, inputs())
    assert fast.statuses == ["rewritten"] * len(form.schedules), fast.sites
    assert tuple(call.schedule for call in fast.arguments) == form.schedules


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss_is_left_alone_and_says_why(name: str) -> None:
    near = NEAR_MISSES[name]
    fast = Rewritten(near.function)
    assert_like_eager(fast, near.function, inputs())
    assert not fast.calls
    assert set(fast.statuses) == {"missed"}
    assert near.reason in fast.sites[0].reason
    assert __file__.replace("test_forms", "forms") in fast.sites[0].source

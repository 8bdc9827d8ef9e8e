"""Every form matches and is as accurate as eager; every near miss says why it does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from structfly.lowering.linear_divergence.arguments import Arguments
from tests.compiling import Rewritten
from tests.oracle import assert_like_eager
from tests.patterns.linear_divergence.forms import FORMS, NEAR_MISSES

BATCH, LENGTH, HIDDEN, WIDTH, CLASSES = 3, 5, 8, 6, 37
OP = torch.ops.structfly.linear_divergence_v1.default


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    x, w, b = (draw(*shape).requires_grad_() for shape in ((BATCH, LENGTH, HIDDEN), (CLASSES, HIDDEN), (CLASSES,)))
    q = draw(BATCH, LENGTH, CLASSES)
    q[..., 4] = -torch.inf
    mask = torch.rand(BATCH, LENGTH, generator=generator) < 0.7
    return x, w, b, draw(BATCH, LENGTH, WIDTH), draw(CLASSES, WIDTH), q.softmax(-1), mask


@pytest.mark.filterwarnings("ignore:reduction. 'mean':UserWarning")
@pytest.mark.parametrize("name", FORMS)
def test_form_is_rewritten_and_exact(name: str) -> None:
    form = FORMS[name]
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):  # for a mask that picks rows
        fast = Rewritten(form.function)
        assert_like_eager(fast, form.function, inputs(), roundings=64)
    assert fast.statuses == ["rewritten"], fast.sites
    (node,) = fast.calls_of(OP)
    arguments: Any = node.args
    call = Arguments(*arguments)
    teacher = "head" if call.teacher is None else call.teacher_form
    assert (call.kind, call.schedule, teacher) == form[1:]


def test_a_mask_that_picks_rows_survives_aot_autograd() -> None:
    function = FORMS["gkd_masked"].function
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        fast = Rewritten(function, then="aot_eager")
        assert_like_eager(fast, function, inputs(), roundings=64)
    assert fast.statuses == ["rewritten"]


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss_is_left_alone_and_says_why(name: str) -> None:
    near = NEAR_MISSES[name]
    fast = Rewritten(near.function)
    assert_like_eager(fast, near.function, inputs())
    assert not fast.calls_of(OP)
    assert set(fast.statuses) == {"missed"}
    assert near.reason in fast.sites[0].reason
    assert __file__.replace("test_forms", "forms") in fast.sites[0].source

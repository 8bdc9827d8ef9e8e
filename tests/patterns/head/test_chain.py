"""Dtypes and devices of what a chain takes; its operations are among the forms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.compiling import Rewritten
from tests.oracle import assert_like_eager

ROWS, HIDDEN, CLASSES = 12, 8, 37
Logits = Callable[[Tensor, Tensor], Tensor]


def inputs(dtype: torch.dtype, operand_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(*shape, generator=generator) for shape in ((ROWS, HIDDEN), (CLASSES, HIDDEN), (CLASSES,)))
    x, w, b = x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), b.to(operand_dtype).requires_grad_()
    return x, w, b, torch.randint(0, CLASSES, (ROWS,), generator=generator)


def head(chain: Logits) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    return lambda x, w, b, t: F.cross_entropy(chain(F.linear(x, w), b).to(torch.promote_types(x.dtype, b.dtype)), t)


CHAINS: dict[str, Logits] = {
    "number": lambda z, b: z * b[0].exp(),
    "one for each class": lambda z, b: torch.tanh(z) * 2.0 + b,
    "one for each row": lambda z, b: z / (b[:ROWS, None] ** 2 + 1.0),
    "bias": lambda z, b: z + b,
}


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize(
    ("dtype", "operand_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float16),
    ],
)
def test_operands_of_other_dtypes(chain: str, dtype: torch.dtype, operand_dtype: torch.dtype) -> None:
    step = head(CHAINS[chain])
    fast = Rewritten(step)
    assert_like_eager(fast, step, inputs(dtype, operand_dtype), min((dtype, operand_dtype), key=lambda d: d.itemsize))
    assert fast.statuses == ["rewritten"]


def test_a_bias_of_another_dtype_is_not_rounded_to_the_logits() -> None:
    x, w, b, t = inputs(torch.bfloat16, torch.float32)
    b = (b.detach() + 200.0).requires_grad_()
    step = head(CHAINS["bias"])
    assert_like_eager(Rewritten(step), step, (x, w, b, t), torch.bfloat16, roundings=1)


def exponentiated(z: Tensor, b: Tensor) -> Tensor:
    return torch.exp(z) + b[0]


@pytest.mark.parametrize(
    ("chain", "dtype", "operand_dtype", "reason"),
    [
        (CHAINS["one for each class"], torch.float32, torch.float64, "wider than the float32"),
        (CHAINS["number"], torch.bfloat16, torch.float64, "wider than the float32"),
        (exponentiated, torch.float16, torch.float16, "has no bound, and float16 no room for it"),
    ],
)
def test_what_the_head_has_no_precision_or_range_for(
    chain: Logits, dtype: torch.dtype, operand_dtype: torch.dtype, reason: str
) -> None:
    fast = Rewritten(head(chain))
    arguments = inputs(dtype, operand_dtype)
    assert torch.equal(fast(*arguments), head(chain)(*arguments))
    (site,) = fast.sites
    assert site.status == "missed"
    assert reason in site.reason


@pytest.mark.gpu
def test_a_number_may_be_on_the_cpu() -> None:
    x, w, _, t = (
        each.detach().cuda().requires_grad_(each.requires_grad) for each in inputs(torch.float32, torch.float32)
    )
    scale = torch.tensor(0.7, requires_grad=True)
    fast = Rewritten(head(lambda z, b: z * b))
    loss, eager = fast(x, w, scale, t), head(lambda z, b: z * b)(x, w, scale, t)
    torch.testing.assert_close(torch.autograd.grad(loss, scale), torch.autograd.grad(eager, scale))
    assert fast.statuses == ["rewritten"]


def test_without_gradients_float16_is_exponentiated() -> None:
    arguments = inputs(torch.float16, torch.float16)
    fast = Rewritten(head(exponentiated))
    with torch.no_grad():
        torch.testing.assert_close(fast(*arguments), head(exponentiated)(*arguments), rtol=1e-2, atol=1e-2)
    assert fast.statuses == ["rewritten"]

"""Weights stored (hidden units, classes): right in every dtype, never copied, with gradients that lie as they do."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from structfly.measure import peak_extra_memory
from tests.compiling import Rewritten
from tests.oracle import assert_like_eager

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def product(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(x @ w, t)


def linear_of_the_transpose(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w.t()), t)


def einsum(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(torch.einsum("nd,dv->nv", x, w), t)


def of_parts(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(x @ torch.cat(w.split([3, w.shape[1] - 3], 1), 1), t)


def usual(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w), t)


def inputs(
    rows: int, hidden: int, classes: int, dtype: torch.dtype, *, usual: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, hidden, generator=generator).to(dtype).requires_grad_()
    shape = (classes, hidden) if usual else (hidden, classes)
    w = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    return x, w, torch.randint(0, classes, (rows,), generator=generator)


@pytest.mark.parametrize(
    ("loss", "dtype"),
    [
        *((product, dtype) for dtype in DTYPES),
        *((loss, torch.float32) for loss in (linear_of_the_transpose, einsum, of_parts)),
    ],
)
def test_value_and_gradients(loss: Loss, dtype: torch.dtype) -> None:
    limited = {"rewrite": "always", "strict": True, "budget": {"loss_memory": 16 * 48 * dtype.itemsize}}
    fast = Rewritten(loss, limited, then="aot_eager")
    arguments = inputs(40, 9, 45, dtype)
    assert_like_eager(fast, loss, arguments, dtype)
    assert fast.statuses == ["rewritten"]
    (gradient,) = torch.autograd.grad(fast(*arguments), arguments[1])
    assert gradient.stride() == arguments[1].stride()


ROWS, HIDDEN, CLASSES = 2, 256, 32768


def peaks(*losses: Loss, dtype: torch.dtype) -> list[int]:
    """Of a step of each, in bytes."""
    found = []
    for loss in losses:
        arguments = inputs(ROWS, HIDDEN, CLASSES, dtype, usual=loss is usual)
        fast = Rewritten(loss)
        step = partial(_step, fast, arguments)
        found.append(peak_extra_memory(step, "cpu"))
    return found


def _step(fast: Rewritten, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
    fast(*arguments).backward()


@pytest.mark.skipif(sys.platform != "linux", reason="the peak counter is Linux's")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_is_never_copied(dtype: torch.dtype) -> None:
    """In a process of its own: the counter is of a whole process, whatever it has done before."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        reference, *found = process.submit(peaks, usual, product, linear_of_the_transpose, dtype=dtype).result()
    weight = HIDDEN * CLASSES * dtype.itemsize
    assert max(found) < reference + weight // 4, found

"""The row step as a generated Triton kernel; formulas in :mod:`structfly.lowering.linear_cross_entropy.rows`."""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from structfly.errors import UnsupportedError
from structfly.lowering.linear_cross_entropy.epilogue import Epilogue
from structfly.lowering.linear_cross_entropy.rows import ClassTerms
from structfly.lowering.template import load, render

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def row_step_triton(
    logits: Tensor, target: Tensor, coefficient: Tensor | None, terms: ClassTerms, *, gradient: bool
) -> Tensor:
    """Fulfils :class:`~structfly.lowering.linear_cross_entropy.rows.RowStep`: one program a row, two sweeps.

    Raises:
        UnsupportedError: the logits' dtype is none of float32, float16 and bfloat16.
    """
    if logits.dtype not in _DTYPES:
        raise UnsupportedError(f"Triton rows of {logits.dtype}; supported: {', '.join(map(str, _DTYPES))}")
    rows, classes = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows == 0:
        return losses
    kernel = _kernel(
        terms.epilogue,
        bias=terms.bias is not None,
        mask=terms.mask is not None,
        class_weight=terms.weight is not None,
        coefficient=coefficient is not None,
        smoothing=terms.label_smoothing,
        ignore_index=terms.ignore_index,
        gradient=gradient,
        gradient_scale=terms.gradient_scale,
    )
    block, warps = launch_sizes(classes)
    nothing = losses  # a pointer the kernel does not read
    with torch.cuda.device(logits.device) if logits.is_cuda else nullcontext():
        kernel[(rows,)](
            logits,
            target,
            nothing if coefficient is None else coefficient.contiguous(),
            nothing if terms.bias is None else terms.bias.contiguous(),
            nothing if terms.mask is None else terms.mask.contiguous().view(torch.uint8),
            nothing if terms.weight is None else terms.weight.contiguous(),
            nothing if terms.weight_sum is None else terms.weight_sum,
            losses,
            logits.stride(0),
            CLASSES=classes,
            BLOCK=block,
            num_warps=warps,
        )
    return losses


@lru_cache(maxsize=256)
def _kernel(epilogue: Epilogue, **parameters: Any) -> Any:
    steps = tuple((step.operation, step.constant) for step in epilogue.steps)
    return load(render("linear_cross_entropy_rows", steps=steps, **parameters)).rows


def launch_sizes(classes: int) -> tuple[int, int]:
    """Classes at a time, and warps: eight classes, 16 bytes of bfloat16, a thread.

    Wider blocks leave fewer rows on a multiprocessor, which costs more on 50257 classes than it gains on 131072.
    """
    block = min(4096, max(16, 1 << (classes - 1).bit_length()))
    return block, max(1, block // 256)

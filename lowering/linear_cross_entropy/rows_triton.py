"""The row step as generated Triton kernels; formulas in :mod:`structfly.lowering.linear_cross_entropy.rows`."""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from structfly.errors import UnsupportedError
from structfly.lowering.head.chunks import ROWS_A_SUM
from structfly.lowering.head.epilogue import Epilogue
from structfly.lowering.head.row_kernels import KERNEL_DTYPES, launch_sizes
from structfly.lowering.linear_cross_entropy.rows import ClassTerms, RowResults
from structfly.lowering.template import load, render


def row_step_triton(
    logits: Tensor, target: Tensor, coefficient: Tensor | None, terms: ClassTerms, *, gradient: bool
) -> RowResults:
    """Fulfils :class:`~structfly.lowering.linear_cross_entropy.rows.RowStep`: one program a row, two sweeps.

    Gradients of operands that the classes have are sums over rows.  Where one is wanted, a second kernel makes the
    second sweep, in tiles of rows and classes.

    Raises:
        UnsupportedError: the logits' dtype is none of float32, float16 and bfloat16.
    """
    if logits.dtype not in KERNEL_DTYPES:
        raise UnsupportedError(f"Triton rows of {logits.dtype}; supported: {', '.join(map(str, KERNEL_DTYPES))}")
    rows, classes = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    wanted = [operand for operand, want in enumerate(terms.operand_gradients) if want and gradient]
    by_class = tuple(operand for operand in wanted if terms.by_class(operand))
    by_row = tuple(operand for operand in wanted if not terms.by_class(operand))
    if rows == 0:
        sizes = (classes if operand in by_class else 0 for operand in wanted)
        return RowResults(losses, tuple(losses.new_zeros(size) for size in sizes))
    kernels = _kernels(
        terms.epilogue,
        by_row=by_row,
        by_class=by_class,
        bias=terms.bias is not None,
        class_weight=terms.weight is not None,
        coefficient=coefficient is not None,
        smoothing=terms.label_smoothing,
        ignore_index=terms.ignore_index,
        gradient=gradient,
        gradient_scale=terms.gradient_scale,
    )
    block, warps = launch_sizes(classes)
    tile = min(block, _TILE_CLASSES)
    tiles, groups = (-(-classes // tile), -(-rows // ROWS_A_SUM)) if by_class else (1, 0)
    row_sums = losses.new_zeros(len(by_row), rows, tiles)
    class_sums = losses.new_empty(len(by_class), groups, classes)
    nothing = losses  # a pointer the kernel does not read
    lse = torch.empty_like(losses) if by_class else nothing
    arguments = (
        logits,
        target,
        nothing if coefficient is None else coefficient.contiguous(),
        nothing if terms.bias is None else terms.bias.contiguous(),
        nothing if terms.weight is None else terms.weight.contiguous(),
        nothing if terms.weight_sum is None else terms.weight_sum,
        *(o.contiguous().view(torch.uint8) if o.dtype == torch.bool else o.contiguous() for o in terms.operands),
        losses,
        lse,
        row_sums,
        class_sums,
        logits.stride(0),
        rows,
    )
    with torch.cuda.device(logits.device) if logits.is_cuda else nullcontext():
        kernels.rows[(rows,)](*arguments, CLASSES=classes, BLOCK=block, num_warps=warps)
        if by_class:
            kernels.tiles[(tiles, groups)](*arguments, CLASSES=classes, BLOCK=tile, ROWS=ROWS_A_SUM)
    row_totals, class_totals = iter(row_sums.sum(2)), iter(class_sums.sum(1))
    return RowResults(losses, tuple(next(class_totals if o in by_class else row_totals) for o in wanted))


# Classes at a time in the second kernel: four a thread.
_TILE_CLASSES = 512


@lru_cache(maxsize=256)
def _kernels(
    epilogue: Epilogue, *, by_row: tuple[int, ...], by_class: tuple[int, ...], **parameters: Any
) -> ModuleType:
    wanted = [operand in by_row or operand in by_class for operand in range(len(epilogue.operands))]
    kinds = tuple((operand.kind, operand.index in epilogue.conditions) for operand in epilogue.operands)
    source = render(
        "linear_cross_entropy_rows",
        steps=epilogue.source(wanted),
        operands=kinds,
        by_row=by_row,
        by_class=by_class,
        **parameters,
    )
    return load(source)

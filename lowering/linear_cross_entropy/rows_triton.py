"""The row step as generated Triton kernels; formulas in :mod:`structfly.lowering.linear_cross_entropy.rows`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from structfly.errors import UnsupportedError
from structfly.lowering.head.chunks import ROWS_A_SUM
from structfly.lowering.head.epilogue import Epilogue
from structfly.lowering.head.row_kernels import KERNEL_DTYPES, launch_sizes
from structfly.lowering.launch import Launch, on_device
from structfly.lowering.linear_cross_entropy.rows import (
    ClassTerms,
    Coefficients,
    Indices,
    RowFunction,
    RowResults,
    RowStatistics,
)
from structfly.lowering.template import load, render


def row_step_triton(
    logits: Tensor,
    indices: Indices,
    coefficients: Coefficients | RowFunction | None,
    terms: ClassTerms,
    asked: Sequence[str] = ("loss",),
    *,
    gradient: bool,
) -> RowResults:
    """Fulfils :class:`~structfly.lowering.linear_cross_entropy.rows.RowStep`: one program a row, two sweeps.

    The two sweeps are two launches where a function stands between them.  Gradients of operands that the classes have
    are sums over rows.  Where one is wanted, a second kernel makes the second sweep, in tiles of rows and classes.

    Raises:
        UnsupportedError: the logits' dtype is none of float32, float16 and bfloat16.
    """
    if logits.dtype not in KERNEL_DTYPES:
        raise UnsupportedError(f"Triton rows of {logits.dtype}; supported: {', '.join(map(str, KERNEL_DTYPES))}")
    made = _allocate(logits, indices, asked)
    if coefficients is None or isinstance(coefficients, Coefficients):
        factors = coefficients or Coefficients()
        return RowResults(made, None, _launch(logits, indices, factors, terms, made, asked, gradient=gradient))
    _launch(logits, indices, Coefficients(), terms, made, asked, gradient=False)
    losses, factors = coefficients.differentiate(made)
    sums = _launch(logits, indices, factors, terms, made, (), gradient=True, known=True) if gradient else ()
    return RowResults(made, losses, sums)


# Classes at a time in the second kernel: four a thread.
_TILE_CLASSES = 512


def _launch(
    logits: Tensor,
    indices: Indices,
    factors: Coefficients,
    terms: ClassTerms,
    made: RowStatistics,
    asked: Sequence[str],
    *,
    gradient: bool,
    known: bool = False,
) -> tuple[Tensor, ...]:
    """Fill ``made`` with what is ``asked`` or, where it is ``known``, read lse and entropy from it; make dz if it is
    wanted, and return the operands' sums."""
    rows, classes = logits.shape
    if not gradient:
        factors = Coefficients(factors.loss)  # which tell of rows that are left out
    wanted = [operand for operand, want in enumerate(terms.operand_gradients) if want and gradient]
    by_class = tuple(operand for operand in wanted if terms.by_class(operand))
    by_row = tuple(operand for operand in wanted if not terms.by_class(operand))
    numbers = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows == 0:
        return tuple(numbers.new_zeros(classes if operand in by_class else 0) for operand in wanted)
    loss_coefficient = "" if factors.loss is None else "ones" if factors.loss_rows is None else "rows"
    kernels = _kernels(
        terms.epilogue,
        by_row=by_row,
        by_class=by_class,
        bias=terms.bias is not None,
        class_weight=terms.weight is not None,
        smoothing=terms.label_smoothing,
        ignore_index=terms.ignore_index,
        gradient_scale=terms.gradient_scale,
        asked=tuple(asked),
        target="loss" in asked or bool(loss_coefficient),
        choices=0 if indices.choices is None else indices.choices.shape[1],
        loss_coefficient=loss_coefficient,
        lse_coefficient=factors.lse is not None,
        entropy_coefficient=factors.entropy is not None,
        chosen_coefficient=factors.chosen is not None,
        gradient=gradient,
        known=known,
    )
    block, warps = launch_sizes(classes)
    tile = min(block, _TILE_CLASSES)
    tiles, groups = (-(-classes // tile), -(-rows // ROWS_A_SUM)) if by_class else (1, 0)
    row_sums = numbers.new_zeros(len(by_row), rows, tiles)
    class_sums = numbers.new_empty(len(by_class), groups, classes)
    lse, entropy = made.lse, made.entropy
    if by_class and lse is None:  # the second kernel reads it
        lse = numbers
    if by_class and factors.entropy is not None and entropy is None:
        entropy = torch.empty_like(numbers)

    def given(tensor: Tensor | None) -> Tensor:
        """The tensor, or for None a pointer that the kernel does not read."""
        if tensor is None:
            return numbers
        return (tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor).contiguous()

    arguments = (
        logits,
        *map(given, (*indices, factors.loss_rows, factors.lse, factors.entropy, factors.chosen)),
        *map(given, (terms.bias, terms.weight, terms.weight_sum, *terms.operands)),
        *map(given, (made.loss, lse, entropy, made.argmax, made.chosen)),
        row_sums,
        class_sums,
        logits.stride(0),
        rows,
    )
    with on_device(logits.device):
        if not (known and by_class):
            Launch(kernels.rows, (rows,), {"CLASSES": classes, "BLOCK": block}, num_warps=warps)(*arguments)
        if by_class:
            constants = {"CLASSES": classes, "BLOCK": tile, "ROWS": ROWS_A_SUM}
            Launch(kernels.tiles, (tiles, groups), constants)(*arguments)
    row_totals, class_totals = iter(row_sums.sum(2)), iter(class_sums.sum(1))
    return tuple(next(class_totals if operand in by_class else row_totals) for operand in wanted)


def _allocate(logits: Tensor, indices: Indices, asked: Sequence[str]) -> RowStatistics:
    made: dict[str, Tensor] = {}
    for name in asked:
        dtype = torch.int64 if name == "argmax" else torch.float32
        shape = indices.choices.shape if name == "chosen" and indices.choices is not None else logits.shape[:1]
        made[name] = torch.empty(shape, dtype=dtype, device=logits.device)
    return RowStatistics(**made)


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

"""How a workspace in bytes becomes chunks of rows, and in which dtypes gradients wait and are summed.

These rules are shared by the run-time loop, which knows the row count, and by the planner, which only has a hint.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from structfly.lowering.head.epilogue import Epilogue

# Leading dimension of the logits buffer: rows start at multiples of 16 elements, so that GEMMs take aligned paths.
_ALIGNMENT = 16
# Row counts are multiples of a GEMM tile where there are enough rows.
TILE_ROWS = 128
# Rows whose share of a sum over rows one program of a row step makes.
ROWS_A_SUM = 128


def row_stride(classes: int) -> int:
    """Elements from one row of the logits buffer to the next."""
    return -(-classes // _ALIGNMENT) * _ALIGNMENT


def rows_that_fit(classes: int, dtype: torch.dtype, workspace: int) -> int:
    """Rows whose logits fit in ``workspace`` bytes, at least 1."""
    return max(1, workspace // (row_stride(classes) * dtype.itemsize))


def rows_per_chunk(rows: int, classes: int, dtype: torch.dtype, workspace: int, group: int = 1) -> int:
    """Rows whose logits fit in ``workspace`` bytes, at least 1, evened out over the chunks they make; whole groups of
    ``group`` rows, at least one."""
    fit = rows_that_fit(classes, dtype, workspace)
    if fit >= rows:
        return max(rows, 1)
    if group > 1:
        groups = rows // group
        return -(-groups // -(-groups // max(1, fit // group))) * group
    if fit >= TILE_ROWS:
        fit -= fit % TILE_ROWS
    chunks = -(-rows // fit)
    even = -(-rows // chunks)
    return min(fit, -(-even // TILE_ROWS) * TILE_ROWS) if fit >= TILE_ROWS else even


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, float64 for float64: the dtype of losses, statistics and coefficients of logits of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def saved_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which gradients wait for the upstream factor.

    float16 has neither the range for sums over tokens nor the precision for values over their count, so its
    gradients wait in float32 and are rounded once, after the factor (of a GradScaler, say) is known.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def accumulation_dtype(dtype: torch.dtype, chunks: int) -> torch.dtype:
    """The dtype in which the gradient of a weight of ``dtype`` is summed over ``chunks`` chunks.

    A sum in bfloat16 is rounded after every chunk.  Over k chunks that is up to (k + 1) / 2 times the variance of
    eager's one rounding, where classes are rare: sqrt((k + 1) / 2) times its error.
    """
    return torch.float32 if dtype == torch.bfloat16 and chunks > 1 else saved_dtype(dtype)


def operand_sum_bytes(epilogue: Epilogue, wanted: Sequence[bool], rows: int, length: int, classes: int) -> int:
    """Bytes that the sums for the gradients of an epilogue's operands take, in chunks of ``length`` of ``rows`` rows.

    A sum over rows is made of one for every so many rows of a chunk, a sum over classes is one a row.
    """
    kinds = [operand.kind for operand, want in zip(epilogue.operands, wanted, strict=True) if want]
    by_class = kinds.count("class")
    return 4 * (by_class * classes * (1 + -(-length // ROWS_A_SUM)) + (len(kinds) - by_class) * rows)

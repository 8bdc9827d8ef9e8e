"""For which operands products of blocks are generated, and how rows are brought to what descriptors take."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from structfly.lowering.descriptor import ALIGNED

DTYPES = (torch.bfloat16, torch.float16)
"""Of operands."""


def why_no_products(values: Tensor, sides: Iterable[int]) -> str:
    """Why products with blocks like ``values`` are left to torch, or "".

    Args:
        values: the blocks.
        sides: of the parts of all operands.
    """
    if not values.is_cuda:
        return f"they are on {values.device.type}"
    if values.dtype not in DTYPES:
        return f"they are {values.dtype}; generated are products of {', '.join(map(str, DTYPES))}"
    if any(side * values.element_size() % ALIGNED for side in sides):
        return f"their sides, {', '.join(map(str, sides))}, are no multiples of {ALIGNED} bytes"
    return ""


def padded(rows: Tensor, width: int) -> Tensor:
    """(N, width) of rows, with zeros after what there is, contiguous from a multiple of 16 bytes on."""
    if width > rows.shape[1]:
        return torch.nn.functional.pad(rows, (0, width - rows.shape[1]))
    rows = rows.contiguous()
    return rows.clone() if rows.data_ptr() % ALIGNED else rows


def padded_rows(rows: int) -> int:
    """Up to what components of so many rows are padded, so that each begins at a multiple of 16 bytes."""
    return -(-rows // 8) * 8

"""For which operands products of blocks are generated, and how rows are brought to what descriptors take."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from structfly.lowering.descriptor import ALIGNED, why_no_rounding

DTYPES = (torch.bfloat16, torch.float16)
"""Of operands, apart from float32 where that may be rounded to TF32."""


def why_no_products(values: Tensor, sides: Iterable[int], tf32: bool) -> str:
    """Why products with blocks like ``values`` are left to torch, or "".

    Args:
        values: the blocks.
        sides: of the parts of all operands.
        tf32: whether products of float32 may round their operands to TF32.
    """
    if not values.is_cuda:
        return f"they are on {values.device.type}"
    # Tensor cores have no part in products of float32 as it is: what those take is their operations' time, of which a
    # device does fewer than 20 while it moves a byte.  What generated products save, bytes, is the least of it.
    if values.dtype == torch.float32 and not tf32:
        return "they are torch.float32, of which products are generated where torch's setting lets them be in TF32"
    if values.dtype == torch.float32 and (why := why_no_rounding()):
        return f"they are torch.float32, and {why}"
    if values.dtype not in (*DTYPES, torch.float32):
        named = ", ".join(map(str, DTYPES))
        return f"they are {values.dtype}; generated are products of {named}, and of torch.float32 in TF32"
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


def with_inner_side_last(blocks: Tensor) -> Tensor:
    """A copy of blocks (count, inner side, other side) as (count, other side, inner side), contiguous.

    Tensor cores take an operand in TF32 from shared memory as it lies there only if its inner side is last; another
    goes through registers in each step.  Blocks are few beside the tokens that are multiplied by them.
    """
    return blocks.mT.contiguous()

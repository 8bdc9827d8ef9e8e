"""Operations of a head's matrix products."""

from __future__ import annotations

from typing import Any

from structfly.lowering.head.linear import Wanted


def products(x: Any, adapter: Any, classes: int, wanted: Wanted | None) -> int:
    """Floating-point operations of the matrix products of one pass; a multiply-add counts two."""
    rows, hidden = map(int, x)
    body = 2 * rows * hidden * classes
    low_rank = 0 if adapter is None else 2 * rows * int(adapter[1]) * classes
    total = body + low_rank
    if wanted is not None:
        total += body * (wanted.x + wanted.weight) + low_rank * (wanted.adapter_x + wanted.adapter_weight)
    return total

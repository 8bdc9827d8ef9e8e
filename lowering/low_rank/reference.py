"""The eager reference, which is the op's specification."""

from __future__ import annotations

from torch import Tensor


def low_rank_reference(x: Tensor, right: Tensor, left: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = left (right x) + bias.

    Args:
        x: (*rows, in).
        right: (rank, in).
        left: (out, rank).
        bias: (out,), or None.

    Returns:
        (*rows, out).
    """
    y = (x @ right.t()) @ left.t()
    return y if bias is None else y + bias

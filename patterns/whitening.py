"""Roots of covariances, with which a distance under them becomes the Frobenius norm."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

RIDGE = 1e-4  # of the mean eigenvalue: what the calibration tokens never showed still counts a little


class Root(NamedTuple):
    """``of`` = M^(1/2) and ``inverse`` = M^(-1/2), both symmetric (*batch, n, n)."""

    of: Tensor
    inverse: Tensor


def root(matrix: Tensor | None, like: Tensor, ridge: float = RIDGE) -> Root | None:
    """The roots of M + ridge mean(diagonal of M) I for covariances M (*batch, n, n), None for None.

    Args:
        matrix: symmetric, positive semidefinite up to rounding.
        like: gives the dtype and device of the result.
        ridge: relative to the mean eigenvalue.
    """
    if matrix is None:
        return None
    values, vectors = torch.linalg.eigh(matrix.to(device=like.device, dtype=torch.float64))
    values = values.clamp_min(0)
    values = values + ridge * values.mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    roots = values.sqrt()[..., None, :]
    return Root(
        ((vectors * roots) @ vectors.mT).to(like.dtype),
        ((vectors / roots) @ vectors.mT).to(like.dtype),
    )

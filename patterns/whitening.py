"""Roots of covariances, with which a distance under them becomes the Frobenius norm."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_RIDGE = 1e-4  # of the mean eigenvalue: what the calibration tokens never showed still counts a little


class Root(NamedTuple):
    """``of`` = M^(1/2) and ``inverse`` = M^(-1/2), both symmetric (n, n)."""

    of: Tensor
    inverse: Tensor


def root(matrix: Tensor | None, like: Tensor, ridge: float = _RIDGE) -> Root | None:
    """The roots of M + ridge mean(diagonal of M) I for a covariance M (n, n), None for None.

    Args:
        matrix: symmetric, positive semidefinite up to rounding.
        like: gives the dtype and device of the result.
        ridge: relative to the mean eigenvalue.
    """
    if matrix is None:
        return None
    values, vectors = torch.linalg.eigh(matrix.to(device=like.device, dtype=torch.float64))
    values = values.clamp_min(0)
    values = values + ridge * _at_least_tiny(values.mean())
    roots = values.sqrt()
    return Root(
        ((vectors * roots) @ vectors.t()).to(like.dtype),
        ((vectors / roots) @ vectors.t()).to(like.dtype),
    )


def ridged(matrix: Tensor | None, like: Tensor, ridge: float = _RIDGE) -> Tensor | None:
    """M + ridge mean(diagonal of M) I for a covariance M (n, n), in float64 on ``like``'s device; None for None."""
    if matrix is None:
        return None
    wide = matrix.to(device=like.device, dtype=torch.float64)
    return wide + ridge * _at_least_tiny(wide.diagonal().mean()) * torch.eye(len(wide)).to(wide)


def _at_least_tiny(mean: Tensor) -> Tensor:
    return mean.clamp_min(torch.finfo(torch.float32).tiny)

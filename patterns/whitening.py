"""Roots of covariances, with which a distance under them becomes the Frobenius norm."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from structfly.records.layer import LayerStatistics

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


class Whitened:
    """A weight with both metrics taken out: ``weight`` = G^(1/2) W A^(1/2), in which
    :meth:`~structfly.records.layer.LayerStatistics.loss_of` is half the squared Frobenius norm."""

    def __init__(self, weight: Tensor, statistics: LayerStatistics) -> None:
        self._inner = root(statistics.input_covariance, weight)
        self._outer = root(statistics.output_fisher, weight)
        self.weight = weight if self._inner is None else weight @ self._inner.of
        self.weight = self.weight if self._outer is None else self._outer.of @ self.weight

    def left(self, factor: Tensor) -> Tensor:
        """A left factor (out, rank) of ``weight`` as one of W."""
        return factor if self._outer is None else self._outer.inverse @ factor

    def right(self, factor: Tensor) -> Tensor:
        """A right factor (rank, in) of ``weight`` as one of W."""
        return factor if self._inner is None else factor @ self._inner.inverse

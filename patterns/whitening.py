"""Factors of covariances, with which a distance under them becomes the Frobenius norm."""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor

from structfly.records.layer import LayerStatistics

RIDGE = 1e-4  # of the mean eigenvalue: what the calibration tokens never showed still counts a little


class Root(NamedTuple):
    """``of`` = M^(1/2) and ``inverse`` = M^(-1/2), both symmetric (*batch, n, n)."""

    of: Tensor
    inverse: Tensor


def root(matrix: Tensor | None, like: Tensor) -> Root | None:
    """The roots of M + RIDGE mean(diagonal of M) I for covariances M (*batch, n, n), None for None.

    Args:
        matrix: symmetric, positive semidefinite up to rounding.
        like: gives the dtype and device of the result.
    """
    if matrix is None:
        return None
    values, vectors = torch.linalg.eigh(matrix.to(device=like.device, dtype=torch.float64))
    values = values.clamp_min(0)
    values = values + RIDGE * values.mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    roots = values.sqrt()[..., None, :]
    return Root(
        ((vectors * roots) @ vectors.mT).to(like.dtype),
        ((vectors / roots) @ vectors.mT).to(like.dtype),
    )


def with_ridge(matrix: Tensor | None, like: Tensor) -> Tensor | None:
    """M + RIDGE mean(diagonal of M) I, of which :func:`root` gives the roots; None for None."""
    if matrix is None:
        return None
    matrix = matrix.to(device=like.device, dtype=like.dtype)
    mean = matrix.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    return matrix + RIDGE * mean * torch.eye(len(matrix), dtype=like.dtype, device=like.device)


def has_metric(statistics: LayerStatistics) -> bool:
    """Whether the distance under these statistics is another than the Frobenius norm."""
    return statistics.input_covariance is not None or statistics.output_fisher is not None


def in_metric(weight: Tensor, outer: Tensor | None, inner: Tensor | None) -> Tensor:
    """G W A with G = ``outer`` and A = ``inner``, None for the identity."""
    weight = weight if outer is None else outer @ weight
    return weight if inner is None else weight @ inner


class Covariances(NamedTuple):
    """A and G in float64 with the ridge of :func:`with_ridge`, None for the identity."""

    inner: Tensor | None
    outer: Tensor | None

    @classmethod
    def of(cls, statistics: LayerStatistics, like: Tensor) -> Self:
        both = (statistics.input_covariance, statistics.output_fisher)
        return cls(*(with_ridge(each, like.double()) for each in both))


class Metric(NamedTuple):
    """Lower Cholesky factors of A and of G, None for the identity.

    With A = L L^T and G = K K^T the loss of a change E is half the square of the norm of K^T E L.
    """

    inner: Tensor | None
    outer: Tensor | None

    @classmethod
    def of(cls, covariances: Covariances, like: Tensor) -> Self:
        return cls(*(None if each is None else torch.linalg.cholesky(each).to(like.dtype) for each in covariances))

    def whiten(self, weight: Tensor) -> Tensor:
        """K^T W L."""
        whitened = self.whiten_right(weight)
        return whitened if self.outer is None else self.outer.t() @ whitened

    def whiten_right(self, right: Tensor) -> Tensor:
        """right L."""
        return right if self.inner is None else right @ self.inner

    def restore(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of W from factors of what :meth:`whiten` makes of it."""
        solve = torch.linalg.solve_triangular
        return (
            left if self.outer is None else solve(self.outer.t(), left, upper=True),
            right if self.inner is None else solve(self.inner, right, upper=False, left=False),
        )

"""Least-squares values of the blocks that a weight keeps, under what data said of the layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from structfly.lowering.block_sparse.layout import Grid
from structfly.patterns.whitening import Covariances
from structfly.records.layer import LayerSizes

_SWEEPS = 3  # over the rows of blocks, where the output's metric couples them


class _Row(NamedTuple):
    """One row of blocks: its rows of the weight, the columns it keeps, the Cholesky factors of its two metrics."""

    outputs: slice
    inputs: Tensor
    inner: Tensor | None
    outer: Tensor | None


class BlockRefit:
    """Refits the kept blocks of weights of one shape.

    Args:
        kept: bool (rows, columns) of blocks.
        grid: the blocks' sides.
        sizes: the weight's.
        covariances: of the layer.
        like: gives dtype and device.

    With E = B - W the loss tr(G E A E^T) is a square in row i of blocks, B_i, given the others.  With S the columns
    that row i keeps, it is least where [G_ii E_i A + sum over k != i of G_ik E_k A]_S = 0, that is

        B_iS = T A_{:,S} (A_SS)^-1,    T = W_i - G_ii^-1 (sum over k != i of G_ik E_k).

    Without G the sum is 0 and one step is exact; with it each step takes the loss down, or leaves it.
    """

    def __init__(self, kept: Tensor, grid: Grid, sizes: LayerSizes, covariances: Covariances, like: Tensor) -> None:
        self.mask = grid.spread(kept, sizes).to(like.device)
        self.inner, self.outer = (None if metric is None else metric.to(like.dtype) for metric in covariances)
        self.rows = list(self._rows(grid, covariances))

    def _rows(self, grid: Grid, covariances: Covariances) -> Iterator[_Row]:
        inner, outer = covariances
        for first in range(0, len(self.mask), grid.block_out):
            outputs = slice(first, first + grid.block_out)
            inputs = self.mask[first].nonzero()[:, 0]
            if len(inputs):
                of_inputs = None if inner is None else torch.linalg.cholesky(inner[inputs[:, None], inputs])
                of_outputs = None if outer is None else torch.linalg.cholesky(outer[outputs, outputs])
                yield _Row(outputs, inputs, of_inputs, of_outputs)

    def __call__(self, weight: Tensor, start: Tensor | None = None, sweeps: int = _SWEEPS) -> Tensor:
        """B (out, in), zero where nothing is kept: near ``weight`` (out, in), and no farther than ``start``.

        Args:
            start: a weight of the same blocks; None for those of ``weight`` itself.
            sweeps: how often each row is refitted, where there is an output Fisher; else once.
        """
        made = weight * self.mask if start is None else start.clone()
        error = made - weight
        for _ in range(sweeps if self.outer is not None else 1):
            for row in self.rows:
                self._refit(row, weight, made, error)
        return made

    def _refit(self, row: _Row, weight: Tensor, made: Tensor, error: Tensor) -> None:
        target = weight[row.outputs]
        if self.outer is not None and row.outer is not None:
            of_others = self.outer[row.outputs] @ error - self.outer[row.outputs, row.outputs] @ error[row.outputs]
            target = target - _solve(row.outer, of_others)
        if self.inner is None or row.inner is None:
            made[row.outputs, row.inputs] = target[:, row.inputs]
        else:
            of_kept = self.inner[row.inputs] @ target.t()
            made[row.outputs, row.inputs] = _solve(row.inner, of_kept).t()
        error[row.outputs] = made[row.outputs] - weight[row.outputs]


def _solve(cholesky: Tensor, right: Tensor) -> Tensor:
    """In float64, as the factor is: a covariance's smallest eigenvalues may be below float32's rounding."""
    return torch.cholesky_solve(right.to(cholesky.dtype), cholesky).to(right.dtype)

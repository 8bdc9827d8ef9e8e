"""The nearest BLAST weight to a given one, by alternating least squares under the layer's metric.

With E = W - B for the structured B, f = tr(G E A E^T) is quadratic in each of the factors U (left), s (scale) and V
(right).  Written with

    T = G W A,    C_jj'[p, q] = V_j[p] A_jj' V_j'[q],    D_ii'[p, q] = U_i[:, p] G_ii' U_i'[:, q],

minus half the gradient is, with K_i'i[p, q] = sum_jj' s_i'j[p] C_jj'[p, q] s_ij'[q],

    of U_i:      sum_j T_ij V_j^T diag(s_ij) - sum_i' G_ii' U_i' K_i'i,
    of s_ij[p]:  U_i[:, p]^T T_ij V_j[p] - sum_i'j'q D_ii'[p, q] C_jj'[p, q] s_i'j'[q],

and that of V_j is as U_i's with both sides changed over.  Each U_i in turn is moved to its minimum, by
G_ii^-1 gradient K_ii^-1, and s by conjugate gradients with its blocks D_ii * C_jj as preconditioner, which end after
one step where A and G are the identity.  Every move lowers f: small multiples of the identity that keep matrices
invertible shorten the step, they are not part of f.  Nothing here is larger than (blocks * rank)^2 or W, A and G.

A low-rank weight is a BLAST weight with s = 1, but the best one can be a saddle: a component that is zero in a block of
U and in one of V stays so.  The plain projection therefore starts from the low-rank one with noise of its own size, and
is never worse than that without.  The projection under a metric starts from the plain one, and again from the low-rank
one under that metric where this is better than what was found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from structfly.patterns.conjugate_gradients import conjugate_gradients
from structfly.patterns.low_rank import LowRank
from structfly.patterns.nearest import nearest
from structfly.patterns.whitening import has_metric, in_metric, with_ridge
from structfly.records.layer import NO_STATISTICS, LayerStatistics

_DAMPING = 1e-6  # of the mean eigenvalue: about what float32 leaves of a Gram matrix
_SCALE_STEPS = 3  # of conjugate gradients


class _State(NamedTuple):
    """``left`` (row_blocks, m, rank), ``scale`` (rank, row_blocks, column_blocks) and
    ``right`` (column_blocks, n, rank)."""

    left: Tensor
    scale: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        blocks = torch.einsum("imr,rij,jnr->imjn", self.left, self.scale, self.right)
        return blocks.flatten(2).flatten(0, 1)


def project_each(
    settings: Sequence[tuple[int, int, int, int]], weight: Tensor, statistics: LayerStatistics
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each (rank, row_blocks, column_blocks, iterations): right, scale and left as the op has them."""
    ranks = [LowRank(rank=rank) for rank, *_ in settings]
    plain_starts = LowRank.project_each(ranks, weight)
    metric_starts = LowRank.project_each(ranks, weight, statistics)
    metrics = [with_ridge(m, weight) for m in (statistics.output_fisher, statistics.input_covariance)]

    def dense(state: _State) -> Tensor:
        return state.dense()[: weight.shape[0], : weight.shape[1]]

    for _, rows, columns, iterations in settings:
        low_rank = _blocked(next(plain_starts), rows, columns)
        plain = _Problem(weight, [None, None], low_rank)
        state = nearest(weight, NO_STATISTICS, dense, low_rank, plain.refine(_noisy(low_rank), iterations))
        if has_metric(statistics):
            problem = _Problem(weight, metrics, low_rank)
            low_rank = _blocked(next(metric_starts), rows, columns)
            state = nearest(weight, statistics, dense, state, problem.refine(state, iterations))
            if nearest(weight, statistics, dense, state, low_rank) is low_rank:
                state = nearest(weight, statistics, dense, low_rank, problem.refine(low_rank, iterations))
        yield state.right.mT.contiguous(), state.scale, state.left


def _blocked(low_rank: dict[str, Tensor], rows: int, columns: int) -> _State:
    left, right = low_rank["left"], low_rank["right"].t()
    scale = left.new_ones(left.shape[1], rows, columns)
    return _State(_cut(left, rows), scale, _cut(right, columns))


def _noisy(state: _State) -> _State:
    generator = torch.Generator().manual_seed(0)

    def noisy(factor: Tensor) -> Tensor:
        noise = torch.randn(factor.shape, generator=generator, dtype=torch.float64).to(factor)
        return factor + noise * factor.square().mean().sqrt()

    return _State(noisy(state.left), state.scale, noisy(state.right))


def _cut(factor: Tensor, blocks: int) -> Tensor:
    """(blocks, features of each, rank) of (features, rank), zeros behind the last."""
    size = -(-len(factor) // blocks)
    return F.pad(factor, (0, 0, 0, blocks * size - len(factor))).view(blocks, size, -1).clone()


class _Side:
    """The metric of the rows, or of the columns: M (features, features), or None for the identity."""

    def __init__(self, metric: Tensor | None, features: int, blocks: int, size: int) -> None:
        self.blocks, self.size = blocks, size
        self.metric = metric
        if metric is not None:
            # Behind the last feature the weight is zero; a metric of ones there keeps the factors zero, too.
            whole = torch.eye(blocks * size, dtype=metric.dtype, device=metric.device)
            whole[:features, :features] = metric
            self.metric = whole
            of_blocks = whole.view(blocks, size, blocks, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
            self.factor = torch.linalg.cholesky(of_blocks)

    def gram(self, factor: Tensor) -> Tensor:
        """(rank, rank, blocks, blocks): factor_i[:, p]^T M_ij factor_j[:, q]."""
        rank = factor.shape[2]
        if self.metric is None:
            return torch.diag_embed((factor.mT @ factor).permute(1, 2, 0))
        times = self.metric.view(-1, self.blocks, self.size).transpose(0, 1) @ factor  # (j, features, rank)
        grams = factor.mT @ times.view(self.blocks, self.blocks, self.size, rank)  # (j, i, p, q)
        return grams.permute(2, 3, 1, 0)

    def improve(self, factor: Tensor, target: Tensor, grams: Tensor) -> Tensor:
        """Move each block in turn to its minimum; ``grams`` (rank, rank, blocks, blocks), ``target`` as the factor."""
        factor = factor.clone()
        inverses = _inverses(grams.diagonal(dim1=2, dim2=3).permute(2, 0, 1))
        for i in range(self.blocks):
            if self.metric is None:
                gradient = target[i] - factor[i] @ grams[:, :, i, i]
                factor[i] += gradient @ inverses[i]
            else:
                mixed = factor @ grams[:, :, :, i].permute(2, 0, 1)
                rows = self.metric[i * self.size : (i + 1) * self.size]
                gradient = target[i] - rows @ mixed.flatten(0, 1)
                factor[i] += torch.cholesky_solve(gradient, self.factor[i]) @ inverses[i]
        return factor


class _Problem:
    """One weight under one metric, cut into the blocks of ``like``."""

    def __init__(self, weight: Tensor, metrics: Sequence[Tensor | None], like: _State) -> None:
        (rows, height, _), (columns, width, _) = like.left.shape, like.right.shape
        self.rows = _Side(metrics[0], weight.shape[0], rows, height)
        self.columns = _Side(metrics[1], weight.shape[1], columns, width)
        margins = (0, columns * width - weight.shape[1], 0, rows * height - weight.shape[0])
        self.target = F.pad(in_metric(weight, metrics[0], metrics[1]), margins)

    def refine(self, state: _State, iterations: int) -> _State:
        left, scale, right = state
        rows, columns = self.rows, self.columns
        of_rows = self.target.view(rows.blocks, rows.size, -1)
        of_columns = self.target.view(-1, columns.blocks, columns.size).transpose(0, 1)
        for _ in range(iterations):
            grams = rows.gram(left)
            seen = (of_rows.mT @ left).view(rows.blocks, columns.blocks, columns.size, -1)  # T_ij^T U_i
            target = torch.einsum("ijnr,rij->jnr", seen, scale)
            right = columns.improve(right, target, scale.mT[:, None] @ grams @ scale[None])

            inner = columns.gram(right)
            shown = (of_columns @ right).view(columns.blocks, rows.blocks, rows.size, -1)  # T_ij V_j^T
            scale = _improve_scale(scale, torch.einsum("jimr,imr->rij", shown, left), grams, inner)

            target = torch.einsum("jimr,rij->imr", shown, scale)
            left = rows.improve(left, target, scale[:, None] @ inner @ scale.mT[None])
        return _State(left, scale, right)


def _improve_scale(scale: Tensor, target: Tensor, outer: Tensor, inner: Tensor) -> Tensor:
    """Conjugate gradients for s (rank, row_blocks, column_blocks); the Gram matrices are (rank, rank, b, b)."""

    def normal(change: Tensor) -> Tensor:
        return (outer @ change[None] @ inner.mT).sum(1)

    of_rows = outer.diagonal(dim1=2, dim2=3).permute(2, 0, 1)
    of_columns = inner.diagonal(dim1=2, dim2=3).permute(2, 0, 1)
    inverses = _inverses(of_rows[:, None] * of_columns)  # (row_blocks, column_blocks, rank, rank)

    def preconditioned(gradient: Tensor) -> Tensor:
        return (inverses @ gradient.permute(1, 2, 0)[..., None])[..., 0].permute(2, 0, 1)

    return conjugate_gradients(normal, target, scale, preconditioned, steps=_SCALE_STEPS, tolerance=_DAMPING)[0]


def _inverses(grams: Tensor) -> Tensor:
    """Inverses of symmetric matrices (*, rank, rank), damped; made in float64."""
    wide = grams.double()
    damping = _DAMPING * wide.diagonal(dim1=-2, dim2=-1).mean(-1) + torch.finfo(torch.float32).tiny
    wide = wide + torch.diag_embed(damping[..., None].expand(wide.shape[:-1]))
    inverses: Tensor = torch.linalg.inv(wide).to(grams.dtype)
    return inverses

"""Pixelfly: a flat block butterfly and a matrix of low rank, with a learned weight between them.

Pixelated Butterfly (Chen et al. 2021, arXiv 2112.00029).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar, NamedTuple, Self

import torch
from pydantic import Field
from torch import Tensor

from structfly.errors import ArgumentError
from structfly.lowering.block_sparse.op import BLOCK_SPARSE
from structfly.lowering.block_sparse_low_rank.op import BLOCK_SPARSE_LOW_RANK
from structfly.lowering.low_rank.op import LOW_RANK
from structfly.patterns.block_refit import BlockRefit
from structfly.patterns.flat_butterfly import FlatButterfly
from structfly.patterns.low_rank import LowRank
from structfly.patterns.menus import worth_offering
from structfly.patterns.structure import Factor, Factors, Structure
from structfly.patterns.whitening import Covariances, Metric, has_metric
from structfly.records.layer import NO_STATISTICS, TOKENS, LayerCost, LayerSizes, LayerStatistics

_STEPS = 6  # of the alternating projection, without statistics and with them
_RANK_MULTIPLE = 8  # of the ranks that a menu offers, where the budget lets it


class Pixelfly(Structure):
    """W = g B + (1 - g) U V^T with B a flat block butterfly and a learned number g."""

    name: ClassVar[str] = "pixelfly"

    grid: int = Field(ge=1)
    """Blocks along a side of B, a power of two."""

    n_factors: int = Field(ge=0)
    """Butterfly factors of B, at most log2(grid)."""

    rank: int = Field(ge=1)
    """Of U V^T."""

    gated: bool = False
    """Whether g is sigmoid(w x), with a learned w (in,), rather than one number.  There is no dense weight then."""

    @property
    def sparse(self) -> FlatButterfly:
        """B."""
        return FlatButterfly(grid=self.grid, n_factors=self.n_factors)

    @property
    def low_rank(self) -> LowRank:
        """U V^T."""
        return LowRank(rank=self.rank)

    def why_not(self, sizes: LayerSizes) -> str:
        return self.sparse.why_not(sizes) or self.low_rank.why_not(sizes)

    def factors(self, sizes: LayerSizes) -> Mapping[str, Factor]:
        between = {"gate": Factor((sizes.in_features,))} if self.gated else {"gamma": Factor(())}
        return {**self.sparse.factors(sizes), **self.low_rank.factors(sizes), **between}

    def cost(self, sizes: LayerSizes, dtype: torch.dtype) -> LayerCost:
        parts = self.sparse.cost(sizes, dtype), self.low_rank.cost(sizes, dtype)
        between = sizes.in_features if self.gated else 1
        if self.gated:
            scaled = TOKENS * (2 * sizes.in_features + 1)  # g x, (1 - g) x and g
        else:
            scaled = parts[0].parameters + self.rank * sizes.out_features + 1  # g B, (1 - g) U and 1 - g
        return LayerCost(
            parameters=sum(part.parameters for part in parts) + between,
            flops=sum(part.flops for part in parts) + (2 * TOKENS * between if self.gated else 0),
            weight_bytes=sum(part.weight_bytes for part in parts) + between * dtype.itemsize,
            saved_bytes=sum(part.saved_bytes for part in parts) + scaled * dtype.itemsize,
            transient_bytes=sum(part.transient_bytes for part in parts)
            + (2 * TOKENS * sizes.out_features + scaled) * dtype.itemsize,  # the two outputs before they are added
            stages=tuple(stage for part in parts for stage in part.stages),
        )

    def initial(self, sizes: LayerSizes, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        # (B + U V^T) / 2 has half the variance of B and of U V^T, which are independent and alike.
        made = {**self.sparse.initial(sizes, generator), **self.low_rank.initial(sizes, generator)}
        made["values"] *= 2**0.5
        made["left"] *= 2**0.5
        return {**made, **self._even(made["values"], sizes)}

    @classmethod
    def project_each(
        cls, choices: Iterable[Self], weight: Tensor, statistics: LayerStatistics = NO_STATISTICS
    ) -> Iterator[dict[str, Tensor]]:
        """Alternating least squares of B, U and V, each for what the others leave, with g = 1/2.

        It begins with the best U V^T for the whole weight.  Under statistics it goes on from where it ends without
        them, so that it is no farther from ``weight`` than that.
        """
        leading = _Leading(weight)
        known = [NO_STATISTICS, statistics] if has_metric(statistics) else [NO_STATISTICS]
        covariances = [Covariances.of(each, weight) for each in known]
        metrics = [Metric.of(each, weight) for each in covariances]
        for each in choices:
            fit = _Fit(torch.zeros_like(weight), weight[:, : each.rank], leading(each.rank))
            for covariance, metric in zip(covariances, metrics, strict=True):
                fit = each._alternate(weight, metric, each.sparse.refit(weight, covariance), fit)
            yield each._factors_of(fit)

    def _factors_of(self, fit: _Fit) -> dict[str, Tensor]:
        sizes = LayerSizes(fit.sparse.shape[1], fit.sparse.shape[0])
        u, s, vt = torch.linalg.svd(fit.right, full_matrices=False)
        root_of_double = (2 * s).sqrt()
        made = self.sparse.take(2 * fit.sparse)
        made |= {"right": root_of_double[:, None] * vt, "left": fit.left @ u * root_of_double}
        return {**made, **self._even(fit.sparse, sizes)}

    def _alternate(self, weight: Tensor, metric: Metric, refit: BlockRefit, fit: _Fit) -> _Fit:
        """Each step is the least squares of one factor given the others, so that none is farther than the last."""
        right = metric.whiten_right(fit.right)
        for _ in range(_STEPS):
            remainder = metric.whiten(weight - fit.sparse)
            left = torch.linalg.qr(remainder @ right.t()).Q  # spans the best U for this V,
            right = left.t() @ remainder  # the best V for this U
            low_rank = metric.restore(left, right)
            fit = _Fit(refit(weight - low_rank[0] @ low_rank[1], fit.sparse, sweeps=1), *low_rank)
        return fit

    def _even(self, like: Tensor, sizes: LayerSizes) -> dict[str, Tensor]:
        """g = 1/2."""
        return {"gate": like.new_zeros(sizes.in_features)} if self.gated else {"gamma": like.new_tensor(0.5)}

    def to_dense(self, sizes: LayerSizes, factors: Factors) -> Tensor:
        """The weight (out, in).

        Raises:
            ArgumentError: g depends on the input.
        """
        if self.gated:
            raise ArgumentError("a gated Pixelfly has no dense weight, for its g depends on the input; use gated=False")
        gamma = factors["gamma"]
        low_rank = self.low_rank.to_dense(sizes, factors)
        return gamma * self.sparse.to_dense(sizes, factors) + (1 - gamma) * low_rank

    def apply(self, sizes: LayerSizes, factors: Factors, x: Tensor, bias: Tensor | None) -> Tensor:
        """The numbers g and 1 - g go to what is smallest: to the factors, or, where g is the input's, to that."""
        values, columns, right, left = (factors[name] for name in ("values", "columns", "right", "left"))
        static = [sizes.out_features, self.grid]
        if not self.gated:
            scaled = [values * factors["gamma"], right, left * (1 - factors["gamma"]), columns]
            return BLOCK_SPARSE_LOW_RANK(x, scaled, bias, static)
        of_sparse = x * torch.sigmoid(x @ factors["gate"])[..., None]
        y = LOW_RANK(x - of_sparse, [right, left], bias)
        return y + BLOCK_SPARSE(of_sparse, [values, columns], None, static)

    @classmethod
    def menu(cls, sizes: LayerSizes) -> list[Self]:
        """U V^T has a quarter to a third of the parameters, as the paper advises."""
        offered = []
        for sparse in FlatButterfly.menu(sizes):
            blocks = int(sparse.cost(sizes, torch.float32).parameters)
            least, most = -(-blocks // (3 * sum(sizes))), blocks // (2 * sum(sizes))
            round_rank = most - most % _RANK_MULTIPLE
            rank = round_rank if round_rank >= least else most
            if rank >= max(least, 1):
                offered.append(cls(grid=sparse.grid, n_factors=sparse.n_factors, rank=rank))
        return worth_offering(offered, sizes)


class _Fit(NamedTuple):
    """sparse (out, in) + left (out, rank) right (rank, in)."""

    sparse: Tensor
    left: Tensor
    right: Tensor


class _Leading:
    """Rows (rank, n) that span the leading right singular vectors of a matrix (m, n), for any rank."""

    def __init__(self, matrix: Tensor) -> None:
        wide = matrix.double()
        self._image = wide if matrix.shape[0] < matrix.shape[1] else None
        gram = wide @ wide.t() if self._image is not None else wide.t() @ wide
        self._vectors, self._dtype = torch.linalg.eigh(gram).eigenvectors, matrix.dtype

    def __call__(self, rank: int) -> Tensor:
        rows: Tensor = self._vectors[:, -rank:].t()
        if self._image is not None:
            rows = rows @ self._image
        return rows.to(self._dtype)

"""Low rank: W = left right, the best known projection being the truncated SVD of the whitened weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from structfly.lowering.low_rank.op import LOW_RANK
from structfly.patterns.structure import Factor, Factors, Structure
from structfly.patterns.whitening import Covariances, Metric
from structfly.records.layer import NO_STATISTICS, TOKENS, LayerCost, LayerSizes, LayerStatistics, product

_CHOICES = 40  # ranks that a menu offers, evenly spaced below that of as many parameters as the dense weight


class LowRank(Structure):
    """W = left (out, rank) right (rank, in)."""

    name: ClassVar[str] = "low_rank"

    rank: int = Field(ge=1)
    """Columns of ``left``, rows of ``right``."""

    rematerialise: bool = False
    """Whether backward makes ``right x`` again rather than keep it."""

    def why_not(self, sizes: LayerSizes) -> str:
        most = min(sizes)
        return "" if self.rank <= most else f"rank is at most {most} there"

    def factors(self, sizes: LayerSizes) -> Mapping[str, Factor]:
        return {"right": Factor((self.rank, sizes.in_features)), "left": Factor((sizes.out_features, self.rank))}

    def cost(self, sizes: LayerSizes, dtype: torch.dtype) -> LayerCost:
        parameters = self.rank * (sizes.in_features + sizes.out_features)
        between = TOKENS * self.rank * dtype.itemsize
        return LayerCost(
            parameters=parameters,
            flops=2 * TOKENS * parameters,
            weight_bytes=parameters * dtype.itemsize,
            saved_bytes=0 if self.rematerialise else between,
            transient_bytes=between,
            stages=(product(sizes.in_features, self.rank, dtype), product(self.rank, sizes.out_features, dtype)),
        )

    def initial(self, sizes: LayerSizes, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        # Entries of the product have rank var(left) var(right); each of the two layers keeps what it is given.
        right = torch.randn(self.rank, sizes.in_features, generator=generator) / sizes.in_features**0.5
        left = torch.randn(sizes.out_features, self.rank, generator=generator) / (3 * self.rank) ** 0.5
        return {"right": right, "left": left}

    @classmethod
    def project_each(
        cls, choices: Iterable[Self], weight: Tensor, statistics: LayerStatistics = NO_STATISTICS
    ) -> Iterator[dict[str, Tensor]]:
        """The minimum of ``statistics.loss_of``, by the SVD of the whitened weight (Eckart and Young 1936)."""
        metric = Metric.of(Covariances.of(statistics, weight), weight)
        u, s, vt = torch.linalg.svd(metric.whiten(weight), full_matrices=False)
        left, right = metric.restore(u * s.sqrt(), s.sqrt()[:, None] * vt)
        for each in choices:
            yield {"right": right[: each.rank].clone(), "left": left[:, : each.rank].clone()}

    @classmethod
    def losses(
        cls, choices: Iterable[Self], weight: Tensor, statistics: LayerStatistics = NO_STATISTICS
    ) -> Iterator[float]:
        """Half the squared singular values of the whitened weight beyond each rank."""
        metric = Metric.of(Covariances.of(statistics, weight), weight)
        squares = torch.linalg.svdvals(metric.whiten(weight)).double().square()
        tails = torch.cat((squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)))
        for each in choices:
            yield 0.5 * float(tails[each.rank])

    def to_dense(self, sizes: LayerSizes, factors: Factors) -> Tensor:
        return factors["left"] @ factors["right"]

    def apply(self, sizes: LayerSizes, factors: Factors, x: Tensor, bias: Tensor | None) -> Tensor:
        return LOW_RANK(x, [factors["right"], factors["left"]], bias, rematerialise=self.rematerialise)

    @classmethod
    def menu(cls, sizes: LayerSizes) -> list[Self]:
        most = (sizes.parameters - 1) // sum(sizes)  # less than the dense weight has
        return [cls(rank=rank) for rank in sorted({most * k // _CHOICES for k in range(1, _CHOICES + 1)} - {0})]

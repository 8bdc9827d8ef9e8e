"""Low rank in fewer numbers: rank independent rows of the weight are kept, and the others are mixtures of them.

A matrix (out, in) of rank r has r (out + in - r) degrees of freedom, which is what its pivot rows (r, in) and the
mixtures (out - r, r) have; two factors have r^2 more.  This is the row interpolative decomposition (Cheng, Gimbutas,
Martinsson and Rokhlin 2005), in layers called pivoting factorisation (Zhao et al. 2025).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import isqrt
from typing import ClassVar, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from structfly.lowering.pivoted_low_rank.op import PIVOTED_LOW_RANK
from structfly.patterns.low_rank import LowRank
from structfly.patterns.structure import Factor, Factors, Structure
from structfly.records.cost import Stage
from structfly.records.layer import NO_STATISTICS, TOKENS, LayerCost, LayerSizes, LayerStatistics, product

_SHARES = 40  # of the dense weight's parameters that a menu offers


class PivotedLowRank(Structure):
    """W's rows are ``pivots`` (rank, in) and ``mixing`` (out - rank, rank) of them, in some order."""

    name: ClassVar[str] = "pivoted_low_rank"

    rank: int = Field(ge=1)
    """How many rows are kept."""

    rematerialise: bool = False
    """Whether backward makes ``pivots x`` again rather than keep it."""

    def why_not(self, sizes: LayerSizes) -> str:
        most = min(sizes.in_features, sizes.out_features - 1)
        return "" if self.rank <= most else f"rank is at most {most} there"

    def factors(self, sizes: LayerSizes) -> Mapping[str, Factor]:
        return {
            "pivots": Factor((self.rank, sizes.in_features)),
            "mixing": Factor((sizes.out_features - self.rank, self.rank)),
            "order": Factor((sizes.out_features,), learned=False),
        }

    def cost(self, sizes: LayerSizes, dtype: torch.dtype) -> LayerCost:
        others = sizes.out_features - self.rank
        parameters = self.rank * (sizes.in_features + others)
        between = TOKENS * self.rank * dtype.itemsize
        ordered = Stage(0, 2 * TOKENS * sizes.out_features * dtype.itemsize, 1)
        return LayerCost(
            parameters=parameters,
            flops=2 * TOKENS * parameters,
            weight_bytes=parameters * dtype.itemsize + sizes.out_features * 4,
            saved_bytes=0 if self.rematerialise else between,
            transient_bytes=between + 2 * TOKENS * sizes.out_features * dtype.itemsize,
            stages=(product(sizes.in_features, self.rank, dtype), product(self.rank, others, dtype), ordered),
        )

    def initial(self, sizes: LayerSizes, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        # As of nn.Linear: pivots have the variance of its entries, and a mixture of them keeps it.
        others = sizes.out_features - self.rank
        pivots = torch.randn(self.rank, sizes.in_features, generator=generator) / (3 * sizes.in_features) ** 0.5
        mixing = torch.randn(others, self.rank, generator=generator) / self.rank**0.5
        return {"pivots": pivots, "mixing": mixing, "order": torch.arange(sizes.out_features, dtype=torch.int32)}

    @classmethod
    def project_each(
        cls, choices: Iterable[Self], weight: Tensor, statistics: LayerStatistics = NO_STATISTICS
    ) -> Iterator[dict[str, Tensor]]:
        """That of :class:`~structfly.patterns.low_rank.LowRank`, the pivots chosen by QR with column pivoting."""
        for factors in LowRank.project_each(_as_low_rank(choices), weight, statistics):
            yield _pivoted(factors["left"], factors["right"])

    @classmethod
    def losses(
        cls, choices: Iterable[Self], weight: Tensor, statistics: LayerStatistics = NO_STATISTICS
    ) -> Iterator[float]:
        yield from LowRank.losses(_as_low_rank(choices), weight, statistics)

    def to_dense(self, sizes: LayerSizes, factors: Factors) -> Tensor:
        pivots = factors["pivots"]
        return torch.cat((pivots, factors["mixing"] @ pivots)).index_select(0, factors["order"])

    def apply(self, sizes: LayerSizes, factors: Factors, x: Tensor, bias: Tensor | None) -> Tensor:
        tensors = [factors["pivots"], factors["mixing"], factors["order"]]
        return PIVOTED_LOW_RANK(x, tensors, bias, rematerialise=self.rematerialise)

    @classmethod
    def menu(cls, sizes: LayerSizes) -> list[Self]:
        both, most = sum(sizes), min(sizes.in_features, sizes.out_features - 1)
        ranks = set()
        for k in range(1, _SHARES + 1):  # the largest r with r (out + in - r) at most a share of the dense parameters
            wanted = (sizes.parameters - 1) * k // _SHARES
            ranks.add(min((both - 1 - isqrt(both * both - 4 * wanted - 1)) // 2, most))
        return [cls(rank=rank) for rank in sorted(ranks - {0})]


def _as_low_rank(choices: Iterable[PivotedLowRank]) -> list[LowRank]:
    """The structures whose weights these have, in more numbers."""
    return [LowRank(rank=each.rank) for each in choices]


def _pivoted(left: Tensor, right: Tensor) -> dict[str, Tensor]:
    """The same weight left right by pivot rows: those that column-pivoted QR of left^T takes first."""
    from scipy.linalg import qr

    rank = len(right)
    _, chosen = qr(left.t().double().cpu().numpy(), mode="r", pivoting=True)
    kept = torch.from_numpy(chosen[:rank].astype(np.int64)).to(left.device)
    others = torch.from_numpy(np.sort(chosen[rank:]).astype(np.int64)).to(left.device)
    square = left[kept].double()
    mixing = torch.linalg.solve(square.t(), left[others].double().t()).t()
    order = torch.empty(len(left), dtype=torch.int32, device=left.device)
    order[torch.cat((kept, others))] = torch.arange(len(left), dtype=torch.int32, device=left.device)
    return {"pivots": (square @ right.double()).to(left.dtype), "mixing": mixing.to(left.dtype), "order": order}

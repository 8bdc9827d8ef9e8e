"""A chain of batched products as found."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from structfly.lowering.kronecker.reference import FactorShape
from structfly.patterns.batched_chain.reader import Chain
from structfly.records import Site
from structfly.records.layer import LayerSizes


@dataclass(frozen=True)
class ChainSite(Site):
    """One chain.

    Attributes:
        chain: the chain.
        shape: of the result: sizes, dimensions of x where they vary, by number as a string, and -1 for what is left.
        dtype: that the products run in.
        learns: whether anything that is made of the result needs a gradient through it.
        gradients: how many gradients the products have: of their data, and of their factors.
    """

    chain: Chain
    shape: tuple[int | str, ...] | None
    dtype: torch.dtype
    learns: bool
    gradients: int

    @property
    def shapes(self) -> tuple[FactorShape, ...]:
        """Of the factors, the first applied first."""
        return tuple(factor.shape for factor in self.chain.factors)

    @property
    def layer(self) -> LayerSizes:
        """The sizes of the weight that the factors make."""
        return LayerSizes(self.chain.in_features, self.chain.out_features)

    @property
    def dead_nodes(self) -> tuple[fx.Node, ...]:
        return self.chain.nodes

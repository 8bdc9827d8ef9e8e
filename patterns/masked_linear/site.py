"""A masked linear as found."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from structfly.lowering.block_sparse.layout import BlockLayout, Grid
from structfly.patterns.masked_linear.masks import Masked
from structfly.records import Site
from structfly.records.layer import LayerSizes
from structfly.rewriter.constants import Constant
from structfly.rewriter.linear import LinearLike


@dataclass(frozen=True)
class MaskedSite(Site):
    """One linear; those that share a masked weight are a site each.

    Attributes:
        linear: the linear.
        masked: its weight.
        mask: what the mask is made of.
        grid: the blocks that the weight is seen in.
        layout: which of them are kept when the graph is compiled.
        layer: the layer's sizes.
        dtype: that the product runs in.
        gradients: how many gradients the product has: of x, and of the weight.
        weight_gradient: whether the weight has one.
    """

    linear: LinearLike
    masked: Masked
    mask: Constant = field(repr=False)
    grid: Grid
    layout: BlockLayout = field(repr=False)
    layer: LayerSizes
    dtype: torch.dtype
    gradients: int
    weight_gradient: bool

    @property
    def blocks(self) -> int:
        """How many blocks are kept."""
        return self.layout.columns.numel()

    @property
    def dead_nodes(self) -> tuple[fx.Node, ...]:
        return self.linear.nodes  # what makes the weight may serve others

    @property
    def groups(self) -> tuple[tuple[fx.Node, ...], ...]:
        return ((*self.linear.nodes, *self.masked.nodes),)

    @property
    def conditional(self) -> bool:
        return True

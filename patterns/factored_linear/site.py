"""A linear with a factored weight as found."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from structfly.patterns.factored_linear.cuts import Masks
from structfly.patterns.factored_linear.reader import Factored
from structfly.records import Site
from structfly.records.layer import LayerSizes


@dataclass(frozen=True)
class FactoredSite(Site):
    """One linear.

    Attributes:
        found: the linear.
        masks: what is known to be 0, or None.
        layer: the sizes of the whole.
        rank: columns of left, rows of right.
        dtype: that the products run in.
        gradients: how many gradients the products with x have: of x, and of the matrices.
        matrix_gradients: of how many matrices.
    """

    found: Factored
    masks: Masks | None = field(repr=False)
    layer: LayerSizes
    rank: int
    dtype: torch.dtype
    gradients: int
    matrix_gradients: int

    @property
    def others(self) -> bool:
        """Whether another way is offered: two products as they stand are all that low rank is."""
        return self.found.weight_first or self.masks is not None

    @property
    def thin(self) -> bool:
        """Whether the matrices have fewer entries than their product."""
        return self.rank * sum(self.layer) < self.layer.parameters

    @property
    def dead_nodes(self) -> tuple[fx.Node, ...]:
        """Nothing where nothing else is offered, so that other rules may act."""
        return self.found.products if self.others else ()

    @property
    def groups(self) -> tuple[tuple[fx.Node, ...], ...]:
        return (self.found.nodes,)

    @property
    def conditional(self) -> bool:
        return self.masks is not None

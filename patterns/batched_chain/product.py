"""A batched product in one form: which dimensions of the data are rows, batches and contracted, and which are new."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch
from torch import Tensor, fx

from structfly.patterns.batched_chain.axes import sizes_of
from structfly.rewriter.region import example

Entries = tuple[tuple[fx.Node, ...], ...]


@dataclass(frozen=True)
class Product:
    """``node`` = sum over labels that are not in ``out`` of data[``data_labels``] factor[``factor_labels``].

    Attributes:
        node: the product.
        data: its operand.
        factor: the other, or its slices along the first two dimensions.
        data_labels, factor_labels, out_labels: one label a dimension.
        inner: what else it is computed by, where it is written elementwise; nothing else reads that.
    """

    node: fx.Node
    data: fx.Node
    factor: fx.Node | Entries
    data_labels: tuple[str, ...]
    factor_labels: tuple[str, ...]
    out_labels: tuple[str, ...]
    inner: tuple[fx.Node, ...] = ()

    @property
    def given(self) -> tuple[fx.Node, ...]:
        """The nodes that the factor is made of."""
        return (
            (self.factor,) if isinstance(self.factor, fx.Node) else tuple(each for row in self.factor for each in row)
        )

    @property
    def factor_sizes(self) -> tuple[sympy.Expr, ...]:
        value = example(self.given[0])
        assert value is not None
        before = () if isinstance(self.factor, fx.Node) else (len(self.factor), len(self.factor[0]))
        return *map(sympy.Integer, before), *sizes_of(value)


def whole(factor: Tensor | list[list[Tensor]]) -> Tensor:
    """The value of a product's ``factor``."""
    return factor if isinstance(factor, Tensor) else torch.stack([torch.stack(list(row)) for row in factor])

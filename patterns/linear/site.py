"""A linear layer as found: a parameter of the model, and every linear of the graph that reads it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from structfly.records import Site
from structfly.records.layer import LayerSizes
from structfly.rewriter.linear import LinearLike
from structfly.rewriter.region import example_of


@dataclass(frozen=True)
class LinearSite(Site):
    """One weight.

    Attributes:
        calls: the linears that read it, in graph order; nothing else does.
        rows: how many rows each is applied to, at the example's sizes.
        stored: the parameter's own value when the graph is compiled: (out, in), or (in, out) if ``transposed``.
        transposed: whether it is stored that way.
        place: the number of the graph input that it is.
    """

    calls: tuple[LinearLike, ...]
    rows: tuple[int, ...]
    stored: Tensor = field(repr=False)
    transposed: bool
    place: int

    @property
    def layer(self) -> LayerSizes:
        """The layer's sizes."""
        return LayerSizes(*self.stored.shape) if self.transposed else LayerSizes(*self.stored.shape[::-1])

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """What the calls' products run in, each once."""
        return tuple(dict.fromkeys(example_of(call.node).dtype for call in self.calls))

    @property
    def dead_nodes(self) -> tuple[fx.Node, ...]:
        return tuple(call.node for call in self.calls)

    @property
    def groups(self) -> tuple[tuple[fx.Node, ...], ...]:
        return tuple((node,) for node in self.dead_nodes)

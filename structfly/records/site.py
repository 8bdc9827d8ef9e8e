"""What a rule finds in a graph and what it offers there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import sympy
import torch
from torch import fx

from structfly.records.cost import Cost
from structfly.records.layer import TimeSource


@dataclass(frozen=True)
class Site:
    """A place in a graph that a rule can rewrite; rules subclass it with what they bound.

    Attributes:
        rule: the rule's name.
        name: qualified name of the module or parameter concerned, for overrides and reports.
        node: the node the report points at.
        device: where it runs.
        sizes: example values of the symbols in its costs.
    """

    rule: str
    name: str
    node: fx.Node
    device: torch.device
    sizes: Mapping[sympy.Symbol, int] = field(repr=False)

    @property
    def dead_nodes(self) -> tuple[fx.Node, ...]:
        """The nodes that a rewrite makes superfluous."""
        return (self.node,)

    @property
    def groups(self) -> tuple[tuple[fx.Node, ...], ...]:
        """The same, by where what a rewrite computes stands: where the last of each group stood."""
        return (self.dead_nodes,)

    @property
    def conditional(self) -> bool:
        """Whether what is written holds for some arguments of the graph only, so that the others need the graph as it
        was."""
        return False

    @property
    def values_only(self) -> bool:
        """Whether a rewrite makes the same values of the same tensors and does nothing else, so that it may be made in
        the forward and in the backward of a custom autograd function, each by itself."""
        return False

    @property
    def replaces(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(sorted(node.name for node in self.dead_nodes))


@dataclass(frozen=True)
class Candidate:
    """One way of running a site.

    Attributes:
        name: short, unique within the site, shown in reports.
        cost: its cost.
        rewrites: False for the candidate that leaves the site alone.
    """

    name: str
    cost: Cost
    rewrites: bool = True


class LayerCandidate(Protocol):
    """One way of running a linear layer, which may change what it computes.

    Attributes:
        name: short, unique within the layer, shown in reports.
        rewrites: False for the dense weight.
        loss: how much the loss is predicted to rise.
        costs: amounts by name: params, flops, weight_bytes, saved_bytes, transient_bytes, and time in seconds.
        time_from: where that time comes from.
    """

    @property
    def name(self) -> str: ...
    @property
    def rewrites(self) -> bool: ...
    @property
    def loss(self) -> float: ...
    @property
    def costs(self) -> Mapping[str, float]: ...
    @property
    def time_from(self) -> TimeSource: ...


class LayerTiming(Protocol):
    """Times a layer's candidates on its device."""

    def measure(self, candidate: LayerCandidate) -> bool:
        """Time one of them; False where that was done before, or may not be done any more."""
        ...

    def menu(self) -> LayerMenu:
        """The layer's menu with the times that are known by now, of this layer and of others."""
        ...


@dataclass(frozen=True)
class Miss:
    """A failed match: the condition that failed, as a value.

    Attributes:
        rule: the rule's name.
        node: the node that caused it.
        reason: what was wrong and, where there is one, the remedy.
        progress: how far the match got; of several attempts at one anchor the furthest is reported.
        anchor: the node the attempt began at.
        name: qualified name, if it was reached.
    """

    rule: str
    node: fx.Node
    reason: str
    progress: int
    anchor: fx.Node
    name: str = ""


@dataclass(frozen=True)
class Menu:
    """What a rule offers at one site.

    Attributes:
        candidates: the ways of running it; exactly one has ``rewrites=False``.
        peak_limit: transient bytes a candidate may take; infinite for any.
        own_bytes: saved bytes that are this site's own in any case (the gradients of its activations).
        shared_bytes: saved bytes that are needed once however many sites share them (a tied weight's gradient), by key.
        settled: why costs do not matter, or "": one of the rewrites is taken whatever it costs, or none is offered.
    """

    candidates: tuple[Candidate, ...]
    peak_limit: float
    own_bytes: int = 0
    shared_bytes: Mapping[str, int] = field(default_factory=dict)
    settled: str = ""


@dataclass(frozen=True)
class LayerMenu:
    """What a linear layer may become.

    Attributes:
        candidates: the ways of running it; exactly one has ``rewrites=False``.
        settled: why the last of them is taken whatever the budget, or "" where it is chosen under the budget that all
            layers of the graph share.
        basis: what the losses, and the times where they count, are predicted from.
        timing: times candidates before one is chosen; None where what is predicted decides.
    """

    candidates: tuple[LayerCandidate, ...]
    settled: str = ""
    basis: str = ""
    timing: LayerTiming | None = None

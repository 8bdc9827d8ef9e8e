"""What a node of the graph means in terms of distributions over classes.

Divergences are sums of probabilities times log-probabilities, and programs spell them in many ways.  Each node is read
as one of a few algebraic forms, in which all spellings of a divergence are the same:

    Logs            sum_i a_i log d_i + offset,        one number a row and class
    Probabilities   sum_i a_i d_i,                     the same
    Divergence      sum_ij a_ij d_i log d_j,           the same, or summed over the classes
    Constant        a number that the graph computes
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import fx

Nodes = frozenset[fx.Node]
Key = TypeVar("Key")


@dataclass(frozen=True)
class Distribution:
    """A distribution over the classes of every row.

    Attributes:
        form: "logits" (of a softmax), "probabilities" or "log_probabilities" (a tensor as it is), or "mixture".
        node: the logits, or the tensor; None for a mixture.
        class_dim: the softmax's dimension; None for the other forms.
        gradient: whether it takes part in differentiation; two readings of the same logits, one of them detached,
            are different distributions.
        parts: of a mixture, what is mixed and with which weights.
    """

    form: str
    node: fx.Node | None
    class_dim: int | None = None
    gradient: bool = False
    parts: tuple[tuple[Distribution, float], ...] = ()

    @property
    def bases(self) -> frozenset[Distribution]:
        """Itself, or what is mixed."""
        return frozenset(part for part, _ in self.parts) or frozenset({self})

    @property
    def detached(self) -> Distribution:
        parts = tuple((part.detached, weight) for part, weight in self.parts)
        return replace(self, gradient=False, parts=parts)


@dataclass(frozen=True)
class Logs:
    terms: Mapping[Distribution, float]
    nodes: Nodes
    offset: float = 0.0

    def scaled(self, factor: float) -> Logs:
        return replace(self, terms=_scaled(self.terms, factor), offset=self.offset * factor)

    def shifted(self, offset: float) -> Logs:
        """With a number added; that of a mixture goes into its weights."""
        if len(self.terms) == 1:
            ((whole, factor),) = self.terms.items()
            if whole.parts and factor == 1.0:
                parts = tuple((part, weight * math.exp(offset)) for part, weight in whole.parts)
                return replace(self, terms={replace(whole, parts=parts): 1.0})
        return replace(self, offset=self.offset + offset)

    def plus(self, other: Logs) -> Logs:
        terms = _added(self.terms, other.terms)
        return Logs(terms, self.nodes | other.nodes, self.offset + other.offset)

    def renamed(self, change: Callable[[Distribution], Distribution]) -> Logs:
        return replace(self, terms={change(each): factor for each, factor in self.terms.items()})

    @property
    def distributions(self) -> frozenset[Distribution]:
        return frozenset(self.terms)


@dataclass(frozen=True)
class Probabilities:
    terms: Mapping[Distribution, float]
    nodes: Nodes

    def scaled(self, factor: float) -> Probabilities:
        return replace(self, terms=_scaled(self.terms, factor))

    def plus(self, other: Probabilities) -> Probabilities:
        return Probabilities(_added(self.terms, other.terms), self.nodes | other.nodes)

    def renamed(self, change: Callable[[Distribution], Distribution]) -> Probabilities:
        return replace(self, terms={change(each): factor for each, factor in self.terms.items()})

    @property
    def distributions(self) -> frozenset[Distribution]:
        return frozenset(self.terms)


@dataclass(frozen=True)
class Divergence:
    """
    Attributes:
        terms: a_ij by (d_i, d_j).
        nodes: the nodes from the softmaxes' values to this one.
        reduction: "" (a number a row and class), "rows" (a number a row), "sum", "row_mean" (over rows), "batchmean"
            (over the first dimension) or "mean" (over rows and classes).
        kept: for "rows", the classes are still a dimension of size 1.
        label_smoothing: of a cross_entropy.
    """

    terms: Mapping[tuple[Distribution, Distribution], float]
    nodes: Nodes
    reduction: str = ""
    kept: bool = False
    label_smoothing: float = 0.0

    def scaled(self, factor: float) -> Divergence:
        return replace(self, terms=_scaled(self.terms, factor))

    def plus(self, other: Divergence) -> Divergence | None:
        """The sum, or None where it is not a divergence between two distributions, reduced in one way."""
        alike = (self.reduction, self.kept) == (other.reduction, other.kept)
        if not alike or self.label_smoothing or other.label_smoothing or len(self.bases | other.bases) > 2:
            return None
        return replace(self, terms=_added(self.terms, other.terms), nodes=self.nodes | other.nodes)

    def renamed(self, change: Callable[[Distribution], Distribution]) -> Divergence:
        terms = {(change(first), change(second)): factor for (first, second), factor in self.terms.items()}
        return replace(self, terms=terms)

    @property
    def distributions(self) -> frozenset[Distribution]:
        return frozenset(each for pair in self.terms for each in pair)

    @property
    def bases(self) -> frozenset[Distribution]:
        """The distributions it is made of, mixtures taken apart."""
        return frozenset(base for each in self.distributions for base in each.bases)


@dataclass(frozen=True)
class Constant:
    """A number in a 0-d tensor of the dtype that the graph computes it in."""

    value: torch.Tensor = field(compare=False)


@dataclass(frozen=True)
class Stacked:
    """Log-probabilities stacked along a new dimension."""

    members: tuple[Logs, ...]
    dim: int
    nodes: Nodes


Reading = Logs | Probabilities | Divergence | Constant | Stacked


def product(probabilities: Probabilities, logs: Logs, nodes: Nodes) -> Divergence | None:
    """Probabilities times log-probabilities."""
    if logs.offset:
        return None
    terms = {(d, e): a * b for d, a in probabilities.terms.items() for e, b in logs.terms.items()}
    return Divergence(terms, probabilities.nodes | logs.nodes | nodes)


def mixture(members: tuple[Logs, ...], nodes: Nodes) -> Logs | None:
    """``log sum_i exp(log d_i + offset_i)``."""
    parts: list[tuple[Distribution, float]] = []
    for member in members:
        if list(member.terms.values()) != [1.0]:
            return None
        (part,) = member.terms
        parts.append((part, math.exp(member.offset)))
        nodes |= member.nodes
    return _mixed(parts, nodes)


def log_of_sum(probabilities: Probabilities, nodes: Nodes) -> Logs | None:
    """``log sum_i a_i d_i``."""
    nodes |= probabilities.nodes
    if list(probabilities.terms.values()) == [1.0]:
        return Logs(dict(probabilities.terms), nodes)
    return _mixed(list(probabilities.terms.items()), nodes)


def _mixed(parts: list[tuple[Distribution, float]], nodes: Nodes) -> Logs | None:
    if len({part for part, _ in parts}) != 2 or any(part.parts for part, _ in parts):
        return None
    parts.sort(key=lambda part: (str(part[0].node), part[0].form))
    whole = Distribution("mixture", None, None, any(part.gradient for part, _ in parts), tuple(parts))
    return Logs({whole: 1.0}, nodes)


def _scaled(terms: Mapping[Key, float], factor: float) -> dict[Key, float]:
    return {key: value * factor for key, value in terms.items()}


def _added(first: Mapping[Key, float], second: Mapping[Key, float]) -> dict[Key, float]:
    total = dict(first)
    for key, value in second.items():
        total[key] = total.get(key, 0.0) + value
    return {key: value for key, value in total.items() if value}

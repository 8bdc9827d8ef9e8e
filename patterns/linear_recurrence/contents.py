"""What the tensors of a graph hold along time, as far as it is known, and which of them share memory."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple, TypeGuard

from torch import fx

from structfly import compat
from structfly.patterns.linear_recurrence import spans as algebra
from structfly.patterns.linear_recurrence.places import Taken
from structfly.patterns.linear_recurrence.spans import Spans
from structfly.rewriter.region import example, example_tensors

BATCHED = -1
"""Time's dimension inside a vmap over it."""


class View(NamedTuple):
    """Places of a node's tensor."""

    owner: fx.Node
    taken: Taken


class Term(NamedTuple):
    """A product that is no product of gates, but may be what is added to a state."""

    factors: tuple[Spans, Spans]
    dim: int


class Contents:
    """What nodes hold: owners of memory spans along a dimension, views places of those.

    Attributes:
        spans, dims: of owners.
        views: of other nodes that are known.
        terms: products that nothing was written into.
        writes: what writes into an owner.
    """

    def __init__(self) -> None:
        self.spans: dict[fx.Node, Spans] = {}
        self.dims: dict[fx.Node, int] = {}
        self.views: dict[fx.Node, View] = {}
        self.terms: dict[fx.Node, Term] = {}
        self.writes: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        self._clones: dict[fx.Node, fx.Node] = {}
        self._lost: set[fx.Node] = set()
        self._stored: dict[int, set[fx.Node]] = defaultdict(set)

    # ---------------------------------------------------------------------------------------------------- questions

    def is_known(self, node: object) -> TypeGuard[fx.Node]:
        return node in self.views or node in self.spans

    def owner(self, node: Any) -> Any:
        return self.views[node].owner if node in self.views else node

    def dim(self, *nodes: object) -> int | None:
        """Time's dimension, where one of the nodes has one and all have as many dimensions."""
        found = [
            self.views[each].taken.dim if each in self.views else self.dims[each]
            for each in nodes
            if self.is_known(each)
        ]
        ranks = {tensor.ndim for each in nodes if (tensor := example(each)) is not None}
        return found[0] if found and (len(ranks) == 1 or found[0] == BATCHED) else None

    def of(self, node: object, dim: int) -> Spans | None:
        """What a node holds along ``dim``; of one that nothing is known of, itself."""
        if not isinstance(node, fx.Node) or node in self._lost:
            return None
        view = self.views.get(node)
        if view is not None:
            owned, taken = self.spans.get(view.owner), view.taken
            if owned is None or taken.dim != dim:
                return None
            return owned._replace(pieces=algebra.part(owned.pieces, taken.start, taken.places, taken.step))
        if node not in self.spans:
            tensor = example(node)
            if node in self.terms or tensor is None or not 0 <= dim < tensor.ndim:
                return None
            if not isinstance(tensor.shape[dim], int) or tensor.shape[dim] == 0:
                return None
            self.own(node, algebra.steps(self._clones.get(node, node), tensor.shape[dim]), dim)
        return self.spans[node] if self.dims[node] == dim else None

    def view(self, of: fx.Node, taken: Taken) -> View:
        """Places of a node, which may be a view itself, as places of its owner."""
        below = self.views.get(of)
        if below is None:
            return View(of, taken)
        start, step = below.taken.start + taken.start * below.taken.step, taken.step * below.taken.step
        return View(below.owner, taken._replace(start=start, step=step))

    def is_whole(self, spans: Spans, dim: int) -> bool:
        """Whether there are states in as many places as there are inputs."""
        tensor = example(spans.input)
        return tensor is not None and dim != BATCHED and algebra.length(spans.pieces) == tensor.shape[dim]

    # ------------------------------------------------------------------------------------------------------ answers

    def own(self, node: fx.Node, spans: Spans, dim: int) -> None:
        """Memory of its own."""
        self.spans[node], self.dims[node] = spans, dim
        self._store(node)

    def multiply(self, node: fx.Node, factors: tuple[Spans, Spans], dim: int) -> None:
        """A product, whatever it is used for."""
        self.terms[node] = Term(factors, dim)
        self._store(node)

    def copy(self, node: fx.Node, source: fx.Node) -> None:
        """A clone of what nothing is known of yet: it holds the same, in memory of its own."""
        self._clones[node] = self._clones.get(source, source)
        self._store(node)

    def write(self, node: fx.Node, targets: list[fx.Node], new: tuple[int, Spans] | None) -> bool:
        """What ``node`` leaves in the first of ``targets`` from a place on, None if that is not known; of others that
        share its memory nothing is known any more.  Returns whether it is known of that one."""
        owner = self.owner(targets[0])
        old = self.spans.get(owner)
        spans = None if new is None or old is None else algebra.written(old, *new)
        keys = {compat.storage_key(tensor) for each in targets for tensor in example_tensors(each)}
        for each in {each for key in keys for each in self._stored[key]}:
            self.terms.pop(each, None)
            if each is not owner:
                self._lose(each)
        if spans is None:
            self._lose(owner)
            return False
        self.spans[owner] = spans
        self.writes[owner].append(node)
        return True

    def _store(self, node: fx.Node) -> None:
        for tensor in example_tensors(node):
            self._stored[compat.storage_key(tensor)].add(node)

    def _lose(self, node: fx.Node) -> None:
        self.spans.pop(node, None)
        self._lost.add(node)

"""From a batched product back to what its chain is applied to, and forward to what the chain gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import dropwhile

import sympy
import torch
from torch import fx

from structfly import compat
from structfly.patterns.batched_chain.axes import (
    Axes,
    Axis,
    AxisError,
    AxisSplits,
    Dims,
    after,
    product_of,
    root_axes,
    sizes_of,
    viewed,
)
from structfly.patterns.batched_chain.factors import Contraction, OrderedFactor, ordered
from structfly.patterns.batched_chain.product import Product
from structfly.patterns.batched_chain.products import read_products
from structfly.rewriter.calls import Call, read
from structfly.rewriter.region import example
from structfly.rewriter.views import PICKS

Step = Call | Product


@dataclass(frozen=True)
class Chain:
    """What a chain of products computes: result = the first ``out_features`` of factor_T ... factor_1 (x, 0), reshaped.

    Attributes:
        x: (*rows, *features).
        rows: how many of its dimensions are rows.
        products: the first applied first.
        factors: how their factors' axes are put in order.
        dims: the factors' axes as they stand, dimension by dimension.
        nodes: from the first product to the result, and none before.
        result: the node whose value the chain gives.
        out_features: how many features are taken of what the last factor gives.
    """

    x: fx.Node
    rows: int
    products: tuple[Product, ...]
    factors: tuple[OrderedFactor, ...]
    dims: tuple[Dims, ...]
    nodes: tuple[fx.Node, ...]
    result: fx.Node
    out_features: int

    @property
    def in_features(self) -> int:
        """How many features x has."""
        value = _value(self.x)
        return int(sympy.prod(sizes_of(value)[self.rows :]))


def read_chain(last: fx.Node) -> Chain | str | None:
    """The longest chain that ends with the product ``last``; or why there is none; or None where nobody need be told,
    for what its factors would be is made in the graph."""
    reason: str | None = None
    for root, steps in _ways_back(last):
        products = [step for step in steps if isinstance(step, Product)]
        if len(products) < 2:
            continue
        try:
            return _Reading(root, steps).chain()
        except AxisError as error:
            if all(_is_given(factor) for product in products for factor in product.given):
                reason = reason or str(error)
    return reason


def _ways_back(last: fx.Node) -> list[tuple[fx.Node, list[Step]]]:
    """Every node that a chain may be applied to, with the steps from there to ``last``; longer chains first."""
    ways = [way for product in read_products(last) for way in _back(product)]
    return sorted(ways, key=lambda way: -sum(isinstance(step, Product) for step in way[1]))


def _back(product: Product) -> Iterator[tuple[fx.Node, list[Step]]]:
    steps: list[Step] = [product]
    node = product.data
    waiting: list[tuple[fx.Node, list[Step]]] = [(node, list(steps))]
    while (call := viewed(node)) is not None:
        steps.insert(0, call)
        node = call["input"]
        waiting.append((node, list(steps)))
    for earlier in read_products(node):
        for root, before in _back(earlier):
            yield root, [*before, *steps]
    yield from reversed(waiting)


def _is_given(factor: fx.Node) -> bool:
    """Whether a factor is kept by a module, or a part of what is, under views."""
    while (call := read(factor)) is not None and (viewed(factor) is not None or call.op in (*PICKS, "unbind")):
        factor = call["input"]
    return factor.op == "placeholder" and compat.is_state(factor)


class _Reading:
    """One way to read a chain."""

    def __init__(self, root: fx.Node, steps: Sequence[Step]) -> None:
        self.root, self.steps = root, steps
        self.splits = AxisSplits()
        self.contractions: list[Contraction] = []
        self.around: list[Axes] = []  # of each product, all axes of its data

    def chain(self) -> Chain:
        """The chain, up to the last view after it that can be part of it.

        Raises:
            AxisError: why there is none.
        """
        root_dims = dims = root_axes(_value(self.root))
        for step in self.steps:
            dims = self._applied(step, dims) if isinstance(step, Product) else after(step, dims, self.splits)
        products = tuple(step for step in self.steps if isinstance(step, Product))
        places = self._places(products[-1].node, dims)
        failure = AxisError("no order of the features between the products makes Kronecker-sparse factors of them")
        for node, dims in reversed(places):
            try:
                rows, factors = self._factors(root_dims, dims)
            except AxisError as error:
                failure = error
                continue
            nodes = self._nodes(products[0].node, node, [place for place, _ in places])
            chain = Chain(
                self.root,
                rows,
                products,
                tuple(factors),
                tuple(tuple(map(self.splits.refined, each.factor)) for each in self.contractions),
                nodes,
                node,
                factors[-1].shape.features_out,
            )
            return _unpadded(_cut(chain))
        raise failure

    def _applied(self, product: Product, dims: Dims) -> Dims:
        labelled = dict(zip(product.data_labels, map(self.splits.refined, dims), strict=True))
        sizes = product.factor_sizes
        if not all(size.is_Integer for size in sizes):
            raise AxisError("a factor's sizes vary from call to call")
        self.around.append(tuple(axis for dim in dims for axis in dim))
        factor: list[Axes] = []
        for label, size in zip(product.factor_labels, sizes, strict=True):
            if label not in labelled:
                labelled[label] = () if size == 1 else (Axis(size),)
            elif product_of(labelled[label]) != size:
                raise AxisError("a factor is broadcast")
            factor.append(labelled[label])

        def those(labels: set[str]) -> Axes:
            return tuple(axis for label in product.factor_labels if label in labels for axis in labelled[label])

        data, of_factor, out = map(set, (product.data_labels, product.factor_labels, product.out_labels))
        shared = data & of_factor
        self.contractions.append(
            Contraction(those(shared & out), those(shared - out), those(of_factor - data), tuple(factor))
        )
        return tuple(labelled[label] for label in product.out_labels)

    def _places(self, last: fx.Node, dims: Dims) -> list[tuple[fx.Node, Dims]]:
        """The last product, and what views make of it as long as nothing else reads it."""
        places, node = [(last, dims)], last
        while len(readers := _readers(node)) == 1:
            (node,) = readers
            call = viewed(node)
            if call is None:
                break
            try:
                dims = after(call, dims, self.splits)
            except AxisError:
                break
            places.append((node, dims))
        return places

    def _factors(self, root: Dims, dims: Dims) -> tuple[int, list[OrderedFactor]]:
        """How many dimensions of the root are rows, and the factors."""
        refined = self.splits.refined
        contractions = [
            Contraction(refined(each.batches), refined(each.contracted), refined(each.made), each.factor)
            for each in self.contractions
        ]
        taken = {*contractions[0].batches, *contractions[0].contracted}
        every = [refined(dim) for dim in root]
        count = next((n for n, dim in enumerate(every) if not taken.isdisjoint(dim)), len(every))
        rows = tuple(axis for dim in every[:count] for axis in dim)
        features = tuple(axis for dim in every[count:] for axis in dim)
        if set(features) != taken:
            raise AxisError("what the first product takes does not follow all of its rows")
        for axes, each in zip(self.around, contractions, strict=True):
            if {*each.batches, *each.contracted} != set(refined(axes)).difference(rows):
                raise AxisError("the products take different rows, or one matrix for several of their blocks")
            if not each.batches:
                raise AxisError("a product has one block only")
        given = refined(axis for dim in dims for axis in dim)
        if given[: len(rows)] != rows:
            raise AxisError("the rows do not come first in what the products give")
        factors = ordered(features, contractions, given[len(rows) :])
        if factors is None:
            raise AxisError("no order of the features between the products makes Kronecker-sparse factors of them")
        return count, factors

    def _nodes(self, first: fx.Node, result: fx.Node, places: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
        """From the first product to the result; nothing else may read what is between."""
        steps = list(dropwhile(lambda step: step.node is not first, self.steps))
        nodes = (*(node for step in steps for node in _own(step)), *places[1 : places.index(result) + 1])
        own = set(nodes)
        for node in nodes:
            if node is not result and not own.issuperset(_readers(node)):
                raise AxisError(f"{node.name}, between the products, is read elsewhere")
        return nodes


def _own(step: Step) -> tuple[fx.Node, ...]:
    """The nodes of a step, its value last."""
    return (*step.inner, step.node) if isinstance(step, Product) else (step.node,)


def _cut(chain: Chain) -> Chain:
    """With the leading features alone, where that is all that is read of the result."""
    value = _value(chain.result)
    readers = _readers(chain.result)
    if value.ndim != chain.rows + 1 or len(readers) != 1:
        return chain
    (node,) = readers
    call = read(node)
    length = None if call is None else _leading(call, value.ndim)
    if length is None:
        return chain
    length = min(length, chain.out_features) if length >= 0 else chain.out_features + length
    if length < 1:
        return chain
    return replace(chain, nodes=(*chain.nodes, node), result=node, out_features=length)


def _leading(call: Call, ndim: int) -> int | None:
    """How many entries of the last dimension are taken, where all others are."""
    if call.op == "narrow":
        plain = call["dim"] in (-1, ndim - 1) and call["start"] == 0 and isinstance(call["length"], int)
        return call["length"] if plain else None
    if call.op != "getitem" or not isinstance(call["index"], tuple):
        return None
    *rows, last = call["index"]
    full = all(entry is Ellipsis or entry == slice(None) for entry in rows if not isinstance(entry, fx.Node))
    plain = full and not any(isinstance(entry, fx.Node) for entry in rows)
    reaches = Ellipsis in rows or len(rows) == ndim - 1
    if not plain or not reaches or not isinstance(last, slice):
        return None
    leads = last.start in (None, 0) and last.step in (None, 1) and isinstance(last.stop, int)
    return last.stop if leads else None


def _unpadded(chain: Chain) -> Chain:
    """Without zeros that were put behind the features."""
    call = read(chain.x)
    if call is None or call.op != "pad" or _value(chain.x).ndim != chain.rows + 1:
        return chain
    pad, source = call["pad"], example(call["input"])
    zeros = call.get("mode", "constant") == "constant" and call.get("value") in (None, 0)
    behind = (
        isinstance(pad, (tuple, list)) and len(pad) == 2 and pad[0] == 0 and isinstance(pad[1], int) and pad[1] >= 0
    )
    return replace(chain, x=call["input"]) if zeros and behind and source is not None else chain


def _readers(node: fx.Node) -> list[fx.Node]:
    """What uses a node for more than its sizes, which the compiler knows."""
    return [user for user in node.users if (call := read(user)) is None or call.op not in ("size", "dim", "numel")]


def _value(node: fx.Node) -> torch.Tensor:
    value = example(node)
    assert value is not None, node
    return value

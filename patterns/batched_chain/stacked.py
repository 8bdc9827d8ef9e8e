"""A product that is written entry by entry: ``stack([a * x0 + b * x1, c * x0 + d * x1], dim)``.

``x0, x1`` are the parts of one tensor along a dimension, as ``y[:, 0]``, ``y.select(1, 0)`` and ``y.unbind(1)`` are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import fx

from structfly.patterns.batched_chain.axes import sizes_of
from structfly.patterns.batched_chain.product import Product
from structfly.rewriter.calls import Call, read
from structfly.rewriter.labelled import ONE
from structfly.rewriter.region import example
from structfly.rewriter.writes import written

_Pair = tuple[fx.Node, fx.Node]


class _Part(NamedTuple):
    """Part ``number`` of ``source`` along ``dim``; ``nodes`` make it."""

    source: fx.Node
    dim: int
    number: int
    nodes: tuple[fx.Node, ...]


def read_stacked(call: Call) -> Product | None:
    """A stack of such sums as a product."""
    inner: dict[fx.Node, None] = {}
    rows = [_pairs(each, inner) for each in call["tensors"]]
    pairs = [row for row in rows if row is not None]
    if len(pairs) < len(rows) or not isinstance(call.get("dim", 0), int):
        return None
    for operand in pairs[0][0]:
        part = _part(operand)
        product = None if part is None else _product(call, pairs, part, inner)
        if product is not None:
            return product
    return None


def _pairs(node: object, inner: dict[fx.Node, None]) -> list[_Pair] | None:
    """The operands of the products that ``node`` is the sum of; sums and products are added to ``inner``."""
    call = read(node)
    if call is None or call.op not in ("add", "mul") or written(call.node) or call.get("alpha", 1) != 1:
        return None
    one, two = call["input"], call["other"]
    inner[call.node] = None
    if call.op == "mul":
        return [(one, two)] if isinstance(one, fx.Node) and isinstance(two, fx.Node) else None
    found = _pairs(one, inner), _pairs(two, inner)
    return None if found[0] is None or found[1] is None else found[0] + found[1]


def _part(node: fx.Node) -> _Part | None:
    call = read(node)
    if call is None or call.op not in ("select", "getitem"):
        return None
    source, index = call["input"], call["index"]
    value = example(source)
    nodes: tuple[fx.Node, ...] = (node,)
    if value is None:
        split = read(source)
        if split is None or split.op != "unbind" or not isinstance(index, int):
            return None
        value, source, dim = example(split["input"]), split["input"], split.get("dim", 0)
        nodes = node, split.node
    elif call.op == "select":
        dim = call["dim"]
    else:
        entries = list(index) if isinstance(index, tuple) else [index]
        if Ellipsis in entries:
            at = entries.index(Ellipsis)
            entries[at : at + 1] = [slice(None)] * (value.ndim - len(entries) + 1)
        places = [place for place, entry in enumerate(entries) if entry != slice(None)]
        if len(places) != 1:
            return None
        dim, index = places[0], entries[places[0]]
    if value is None or not isinstance(dim, int) or not isinstance(index, int):
        return None
    size = sizes_of(value)[dim]
    return _Part(source, dim % value.ndim, index % int(size), nodes) if size.is_Integer else None


def _product(call: Call, rows: Sequence[Sequence[_Pair]], like: _Part, inner: dict[fx.Node, None]) -> Product | None:
    """The product of parts of one tensor, as ``like`` is one, with all others."""
    result, source = example(call.node), example(like.source)
    assert result is not None
    assert source is not None
    own = dict(inner)
    entries = []
    for row in rows:
        weights: dict[int, fx.Node] = {}
        for pair in row:
            for part, weight in (pair, pair[::-1]):
                found = _part(part)
                if found is not None and found[:2] == like[:2] and found.number not in weights:
                    weights[found.number] = weight
                    own.update(dict.fromkeys(found.nodes))
                    break
            else:
                return None
        if len(weights) != source.shape[like.dim]:
            return None
        entries.append(tuple(weights[index] for index in sorted(weights)))
    values = [example(weight) for row in entries for weight in row]
    dtypes = {source.dtype, result.dtype, *(value.dtype for value in values if value is not None)}
    shapes = {sizes_of(value) for value in values if value is not None}
    if None in values or len(shapes) > 1 or len(dtypes) > 1:
        return None
    sizes = [size for dim, size in enumerate(sizes_of(source)) if dim != like.dim]
    (of_weight,) = shapes
    dim = call.get("dim", 0) % result.ndim
    if [size for place, size in enumerate(sizes_of(result)) if place != dim] != sizes or len(of_weight) > len(sizes):
        return None  # the parts are broadcast
    rest = [str(place) for place in range(len(sizes))]
    along = [
        f"{ONE}{label}" if size == 1 and beside != 1 else label
        for label, size, beside in zip(rest[::-1], of_weight[::-1], sizes[::-1], strict=False)
    ]
    data, out = [*rest], [*rest]
    data.insert(like.dim, "j")
    out.insert(dim, "i")
    labels = tuple(data), ("i", "j", *along[::-1]), tuple(out)
    return Product(call.node, like.source, tuple(entries), *labels, inner=tuple(own))

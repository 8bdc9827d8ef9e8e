"""How a linear with a factored weight is written: ``linear(x, left @ right)``, or ``linear(linear(x, right), left)``.

Linears and products are those of :func:`~structfly.rewriter.linear.read_linear`, under casts and transposes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

from torch import Tensor, fx

from structfly import compat
from structfly.rewriter.calls import flat, read
from structfly.rewriter.linear import LinearLike, is_cast, read_linear, untransposed
from structfly.rewriter.region import Region, example


@dataclass(frozen=True)
class Matrix:
    """The value of ``node``, or its transpose."""

    node: fx.Node
    transposed: bool = False

    @property
    def t(self) -> Matrix:
        return Matrix(self.node, not self.transposed)

    @property
    def shape(self) -> tuple[int, int]:
        value = example(self.node)
        assert value is not None
        rows, columns = value.shape[::-1] if self.transposed else value.shape
        return int(rows), int(columns)

    def of(self, value: Tensor) -> Tensor:
        """The matrix of the node's value."""
        return value.t() if self.transposed else value


@dataclass(frozen=True)
class Factored:
    """y = left (right x + between) + bias.

    Attributes:
        node: its value is y.
        x: (*rows, in).
        right: (rank, in).
        left: (out, rank).
        between: (rank,), or None.
        bias: (out,), or None.
        weight_first: whether ``left right`` is made as it stands, rather than ``right x``.
        nodes: all that is computed anew, ``node`` first.
        products: those of them that are products, casts between them and bias sums.
    """

    node: fx.Node
    x: fx.Node
    right: Matrix
    left: Matrix
    between: fx.Node | None
    bias: fx.Node | None
    weight_first: bool
    nodes: tuple[fx.Node, ...]
    products: tuple[fx.Node, ...]


def factored(linear: LinearLike) -> Factored | None:
    """``linear`` read so."""
    return _weight_first(linear) or _one_by_one(linear)


def made_of_state(region: Region) -> frozenset[fx.Node]:
    """The nodes that are made of nothing but what modules keep: a product of others is no weight."""
    found: set[fx.Node] = set()
    for node in region.graph.nodes:
        if node.op == "placeholder":
            kept = compat.is_state(node)
        else:
            kept = node.op == "get_attr" or (node.op != "output" and found.issuperset(node.all_input_nodes))
        if kept:
            found.add(node)
    return frozenset(found)


def _weight_first(linear: LinearLike) -> Factored | None:
    if linear.adapter is not None:
        return None
    weight, passed = _bare(Matrix(linear.weight, linear.transposed))
    product = _by_einsum(weight.node) or _by_linear(weight.node)
    if product is None:
        return None
    a, b, made_by = product
    left, right = (b.t, a.t) if weight.transposed else (a, b)
    nodes = (*linear.nodes, *_transposes(linear), *passed, *made_by)
    products = (*linear.nodes, weight.node)
    return _known(Factored(linear.node, linear.x, right, left, None, linear.bias, True, nodes, products))


def _by_linear(node: fx.Node) -> tuple[Matrix, Matrix, tuple[fx.Node, ...]] | None:
    """The factors of a product of two matrices that reads as a linear, and the nodes that make it of them."""
    product = read_linear(node)
    value = None if product is None else example(product.x)
    if product is None or product.adapter is not None or product.bias is not None or value is None or value.ndim != 2:
        return None
    nodes = (*product.nodes, *_transposes(product))
    return Matrix(product.x), Matrix(product.weight, product.transposed).t, nodes


def _by_einsum(node: fx.Node) -> tuple[Matrix, Matrix, tuple[fx.Node, ...]] | None:
    """The same of ``einsum`` of two matrices, in any order, as they are or transposed."""
    call = read(node)
    if call is None or call.op != "einsum":
        return None
    left, arrow, out = str(call["equation"]).replace(" ", "").partition("->")
    terms, operands = left.split(","), flat(call["operands"])
    if not arrow or len(operands) != 2 or any(len(term) != 2 or not term.isalpha() for term in (*terms, out)):
        return None
    for (one, a), (two, b) in permutations(zip(terms, operands, strict=True)):
        inner = set(one) & set(two)
        if len(inner) == 1 and set(one) - inner == {out[0]} and set(two) - inner == {out[1]}:
            return Matrix(a, one[1] == out[0]), Matrix(b, two[0] == out[1]), (node,)
    return None


def _one_by_one(linear: LinearLike) -> Factored | None:
    if linear.adapter is not None:
        return None
    inner, passed = linear.x, list[fx.Node]()
    while (call := read(inner)) is not None and is_cast(call) and len(inner.users) == 1:
        passed.append(inner)
        inner = call["input"]
    first = read_linear(inner)
    if first is None or first.adapter is not None or len(inner.users) != 1:
        return None
    left = Matrix(linear.weight, linear.transposed)
    right = Matrix(first.weight, first.transposed)
    products = (*linear.nodes, *passed, *first.nodes)
    nodes = (*products, *_transposes(linear), *_transposes(first))
    return _known(Factored(linear.node, first.x, right, left, first.bias, linear.bias, False, nodes, products))


def _known(found: Factored) -> Factored | None:
    """Nothing where a size varies from call to call, or a matrix is none."""
    for matrix in (found.left, found.right):
        value = example(matrix.node)
        if value is None or value.ndim != 2 or not all(isinstance(size, int) for size in value.shape):
            return None
    return found


def _bare(matrix: Matrix) -> tuple[Matrix, list[fx.Node]]:
    """Without transposes and casts, and what they were."""
    passed: list[fx.Node] = []
    while (call := read(matrix.node)) is not None:
        source = untransposed(matrix.node)
        if source is not None:
            passed.append(matrix.node)
            matrix = Matrix(source, not matrix.transposed)
        elif is_cast(call):
            passed.append(matrix.node)
            matrix = Matrix(call["input"], matrix.transposed)
        else:
            break
    return matrix, passed


def _transposes(linear: LinearLike) -> list[fx.Node]:
    """What stands between a linear and its weight."""
    return [node for node in linear.node.all_input_nodes if node not in (linear.x, linear.weight, linear.bias)]

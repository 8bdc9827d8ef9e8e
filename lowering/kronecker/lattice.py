"""Products with chains of Kronecker-sparse factors, generated for GPUs; the same bits every time.

Features keep the order that the factors say, before and after each.  A factor (d, a, i, j) works along one axis of
the lattice (a, j, d), and a tile has many of its small matrices, neighbours along d or, where d is 1, along a, so that
what it reads and writes are whole runs of memory.  Where d is 1 and the matrices are large, a tile is of one.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from structfly.lowering.block_products.axes import axis_gradients, axis_products
from structfly.lowering.block_products.matrices import matrix_gradients, matrix_products
from structfly.lowering.block_products.matrix_tiles import (
    axis_gradient_tiles,
    axis_tiles,
    matrix_gradient_cut,
    product_tiles,
)
from structfly.lowering.block_products.support import padded, why_no_products
from structfly.lowering.kronecker.reference import FactorShape
from structfly.lowering.layer_products import Applied

_LARGE = 64  # the least side of a matrix that a tile is of alone


def why_not(factors: Sequence[Tensor], tf32: bool) -> str:
    """Why products with these factors are not made so, or ""; ``tf32`` as :func:`why_no_products` has it."""
    for factor in factors:
        shape = FactorShape(*factor.shape)
        if shape.p > 1 or shape.q > 1:
            return f"{shape} has p or q above 1; generated are products along one axis"
        sides = (shape.columns, shape.rows) if shape.d == 1 else (shape.columns, shape.d)
        if why := why_no_products(factor, sides, tf32):
            return why
    return ""


def between(call: Applied) -> list[Tensor]:
    """What stands between the factors, under the shapes in which torch's products keep it."""
    made: list[Tensor] = []
    features = call.x
    for factor in call.factors[:-1]:
        shape = FactorShape(*factor.shape)
        features = _product(features, factor)
        made.append(features.view(shape.matrices, shape.rows, len(call.x)))
    return made


def finish(call: Applied, between: Sequence[Tensor]) -> Tensor:
    """y."""
    last, (out_features,) = call.factors[-1], call.static
    shape = FactorShape(*last.shape)
    bias = call.bias if call.bias is None else padded(call.bias[None], shape.features_out)
    features = between[-1].view(len(call.x), shape.features_in) if between else call.x
    return _product(features, last, bias, call.activation)[:, :out_features].contiguous()


def backward(grad: Tensor, call: Applied, between: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """The gradients that are wanted, of x and each factor."""
    made: list[Tensor | None] = [None] * len(wanted)
    tokens = len(call.x)
    grad = padded(grad, FactorShape(*call.factors[-1].shape).features_out)
    for t in reversed(range(len(call.factors))):
        factor = call.factors[t]
        width = FactorShape(*factor.shape).features_in
        if wanted[t + 1]:
            before = between[t - 1].view(tokens, width) if t else padded(call.x, width)
            made[t + 1] = _gradient(grad, before, factor)
        if not any(wanted[: t + 1]):
            return made
        grad = _product(grad, factor, turned=True)
    made[0] = grad[:, : call.x.shape[1]]
    return made


def _product(
    features: Tensor, factor: Tensor, bias: Tensor | None = None, activation: str = "", *, turned: bool = False
) -> Tensor:
    """(tokens, features) of (tokens, features), with the bias (1, features) added; ``turned``: by the transposes."""
    shape = FactorShape(*factor.shape)
    inside, out = (shape.i, shape.j) if turned else (shape.j, shape.i)
    tokens = len(features)
    features = padded(features, shape.a * inside * shape.d)
    made = features.new_empty(tokens, shape.a * out * shape.d)
    if _is_large(shape):
        matrix_products(
            features.view(tokens, shape.a, 1, inside),
            factor.view(shape.a, 1, shape.i, shape.j),
            made.view(tokens, shape.a, 1, out),
            turned=turned,
            bias=None if bias is None else bias.view(shape.a, out),
            activation=activation,
            tiles=product_tiles(factor, tokens, (1, out), (1, inside)),
        )
        return made
    tiles, batch = axis_tiles(factor, tokens, shape.matrices, out, inside)
    axis_products(
        features.view(tokens, shape.a, inside, shape.d),
        factor.view(shape.d, shape.a, shape.i, shape.j),
        made.view(tokens, shape.a, out, shape.d),
        turned=turned,
        bias=bias,
        activation=activation,
        tiles=tiles,
        batch=batch,
    )
    return made


def _gradient(grad: Tensor, features: Tensor, factor: Tensor) -> Tensor:
    """That of a factor, whose outputs have a gradient ``grad`` and whose inputs are ``features``."""
    shape = FactorShape(*factor.shape)
    tokens = len(grad)
    if _is_large(shape):
        made = factor.new_empty(shape.a, 1, shape.i, shape.j)
        tiles = matrix_gradient_cut(factor, tokens, shape.a, (1, shape.i), shape.j)
        of_outputs, of_inputs = grad.view(tokens, shape.a, shape.i), features.view(tokens, shape.a, shape.j)
        matrix_gradients(of_outputs, of_inputs, made, tiles=tiles)
        return made
    tiles, batch = axis_gradient_tiles(factor, tokens, shape.matrices, shape.i, shape.j)
    lattice_out, lattice_in = (shape.a, shape.i, shape.d), (shape.a, shape.j, shape.d)
    return axis_gradients(grad.view(tokens, *lattice_out), features.view(tokens, *lattice_in), tiles=tiles, batch=batch)


def _is_large(shape: FactorShape) -> bool:
    return shape.d == 1 and min(shape.i, shape.j) >= _LARGE

"""Products with the two factors of a Monarch matrix, generated for GPUs; the same bits every time.

The first factor has a matrix for each of k blocks of inputs, the second one for each of l blocks of outputs, and r
numbers lead from each to each.  So the first gives, and the second takes, features of three axes, in different orders:

    z (tokens, l, k, r) is what the second factor's matrices take, k r in a run for each of l,
    dz (tokens, k, l, r) is what the transposes of the first's take, l r in a run for each of k.

Either is stored in that order by the product that makes it, in runs of r, and the first factor's rows, which lie in the
order (r, l), are loaded in the order (l, r): nothing is copied between the factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from structfly.lowering.block_products.matrices import matrix_gradients, matrix_products
from structfly.lowering.block_products.matrix_tiles import gradient_tiles, product_tiles
from structfly.lowering.block_products.support import padded, why_no_products
from structfly.lowering.kronecker.reference import FactorShape
from structfly.lowering.layer_op import Applied

# Columns of a matrix up to which a product in tiles of many matrices is faster than a copy that orders its outputs.
_NARROW = 128


class _Monarch(NamedTuple):
    """Two factors, (k, l, r, inputs) with its rows in the order in which they are taken, and (l, outputs, k r).

    ``strided``: whether a block's outputs are every l-th of all rather than a run.
    """

    first: Tensor
    second: Tensor
    strided: bool

    @property
    def axes(self) -> tuple[int, int, int]:
        """k, l and r."""
        k, l, r, _ = self.first.shape  # noqa: E741 - the field's name for it
        return k, l, r


def why_not(factors: Sequence[Tensor]) -> str:
    """Why products with these factors are not made so, or ""."""
    shapes = [FactorShape(*factor.shape) for factor in factors]
    if len(shapes) != 2:
        return f"the chain has {len(shapes)} factors; a Monarch matrix has 2"
    one, two = shapes
    if one.d > 1 or two.a > 1 or one.q > 1 or two.p > 1 or one.i % two.d or two.j * two.d != one.features_out:
        return f"{two} after {one} is no Monarch matrix, whose factors are block diagonal but for one permutation"
    return why_no_products(factors[0], (one.columns, one.i // two.d, two.rows))


def worth_a_copy(factors: Sequence[Tensor]) -> bool:
    """Whether outputs that stand apart are worth a copy that orders them, where products along axes need none."""
    two = FactorShape(*factors[1].shape)
    return not _strided(two) or two.columns > _NARROW


def between(call: Applied) -> list[Tensor]:
    """z, under the shape in which torch's products keep it."""
    shape = FactorShape(*call.factors[0].shape)
    return [_between(call, _read(call)).view(shape.matrices, shape.rows, len(call.x))]


def finish(call: Applied, between: Sequence[Tensor]) -> Tensor:
    """y; outputs that stand apart are put in order after the product."""
    monarch = _read(call)
    k, l, r = monarch.axes  # noqa: E741
    second, (out_features,) = monarch.second, call.static
    tokens, outputs = len(call.x), second.shape[1]
    y = call.x.new_empty(tokens, l, outputs)
    bias = call.bias if call.bias is None else _in_blocks(call.bias[None], monarch)[0]
    tiles = product_tiles(second, tokens, (1, outputs), (1, k * r))
    matrix_products(
        between[0].view(tokens, l, 1, k * r),
        second[:, None],
        y[:, :, None],
        bias=bias,
        activation=call.activation,
        tiles=tiles,
    )
    return (y.mT if monarch.strided else y).flatten(1)[:, :out_features].contiguous()


def backward(grad: Tensor, call: Applied, between: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """The gradients that are wanted, of x and each factor."""
    monarch = _read(call)
    k, l, r = monarch.axes  # noqa: E741
    first, second, _ = monarch
    tokens, inputs, outputs = len(call.x), first.shape[3], second.shape[1]
    made: list[Tensor | None] = [None] * len(wanted)
    grad = _in_blocks(grad, monarch)
    if wanted[2]:
        of_second = second.new_empty(l, 1, outputs, k * r)
        tiles = gradient_tiles(second, tokens, l, (1, outputs), k * r)
        matrix_gradients(grad, between[0].view(tokens, l, k * r), of_second, tiles=tiles)
        made[2] = of_second
    if not wanted[0] and not wanted[1]:
        return made
    dz = grad.new_empty(tokens, k, l, r)
    tiles = product_tiles(second, tokens, (k, r), (1, outputs))
    matrix_products(grad[:, :, None], second[:, None], dz.transpose(1, 2), turned=True, tiles=tiles)
    if wanted[1]:
        of_first = first.new_empty(k, r, l, inputs)
        x = padded(call.x, k * inputs).view(tokens, k, inputs)
        tiles = gradient_tiles(first, tokens, k, (l, r), inputs)
        matrix_gradients(dz.flatten(2), x, of_first.transpose(1, 2), tiles=tiles)
        made[1] = of_first
    if wanted[0]:
        dx = grad.new_empty(tokens, k, inputs)
        tiles = product_tiles(first, tokens, (1, inputs), (l, r))
        matrix_products(dz, first, dx[:, :, None], turned=True, tiles=tiles)
        made[0] = dx.flatten(1)[:, : call.x.shape[1]]
    return made


def _read(call: Applied) -> _Monarch:
    one, two = (FactorShape(*factor.shape) for factor in call.factors)
    first = call.factors[0].reshape(one.a, one.i // two.d, two.d, one.columns).transpose(1, 2)
    return _Monarch(first, call.factors[1].reshape(two.d, two.rows, two.columns), strided=_strided(two))


def _strided(second: FactorShape) -> bool:
    return second.i > 1 and second.d > 1


def _between(call: Applied, monarch: _Monarch) -> Tensor:
    """(tokens, l, k, r)."""
    k, l, r = monarch.axes  # noqa: E741
    first = monarch.first
    tokens, inputs = len(call.x), first.shape[3]
    z = call.x.new_empty(tokens, l, k, r)
    x = padded(call.x, k * inputs).view(tokens, k, 1, inputs)
    tiles = product_tiles(first, tokens, (l, r), (1, inputs))
    matrix_products(x, first, z.transpose(1, 2), tiles=tiles)
    return z


def _in_blocks(rows: Tensor, monarch: _Monarch) -> Tensor:
    """(N, l, outputs) of (N, out)."""
    blocks, outputs, _ = monarch.second.shape
    rows = padded(rows, blocks * outputs)
    return (
        rows.view(len(rows), outputs, blocks).mT.contiguous()
        if monarch.strided
        else rows.view(len(rows), blocks, outputs)
    )

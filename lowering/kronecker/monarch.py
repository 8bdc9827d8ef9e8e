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
from structfly.lowering.block_products.matrix_tiles import matrix_gradient_cut, product_tiles
from structfly.lowering.block_products.support import padded, why_no_products
from structfly.lowering.block_products.turned import turned
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


def why_not(factors: Sequence[Tensor], tf32: bool) -> str:
    """Why products with these factors are not made so, or ""; ``tf32`` as :func:`why_no_products` has it."""
    shapes = [FactorShape(*factor.shape) for factor in factors]
    if len(shapes) != 2:
        return f"the chain has {len(shapes)} factors; a Monarch matrix has 2"
    one, two = shapes
    if one.d > 1 or two.a > 1 or one.q > 1 or two.p > 1 or one.i % two.d or two.j * two.d != one.features_out:
        return f"{two} after {one} is no Monarch matrix, whose factors are block diagonal but for one permutation"
    return why_no_products(factors[0], (one.columns, one.i // two.d, two.rows), tf32)


def worth_a_copy(factors: Sequence[Tensor]) -> bool:
    """Whether outputs that stand apart are worth a copy that orders them, where products along axes need none."""
    two = FactorShape(*factors[1].shape)
    return not _strided(two) or two.columns > _NARROW


def between(call: Applied) -> list[Tensor]:
    """z, under the shape in which torch's products keep it."""
    shape, first = FactorShape(*call.factors[0].shape), _read(call).first
    blocks, _, _, inputs = first.shape
    x = padded(call.x, blocks * inputs).view(len(call.x), blocks, inputs)
    return [_between(x, first).view(shape.matrices, shape.rows, len(call.x))]


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
    return (turned(y) if monarch.strided else y).flatten(1)[:, :out_features].contiguous()


def backward(grad: Tensor, call: Applied, between: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """The gradients that are wanted, of x and each factor."""
    k, l, r = _read(call).axes  # noqa: E741
    return _gradients(grad, call, wanted, k, between[0].view(len(call.x), l, k * r))


def backward_in_groups(grad: Tensor, call: Applied, wanted: Sequence[bool]) -> list[Tensor | None]:
    """The same where nothing was kept: of a group of the first factor's blocks at a time.

    A block of inputs leads to numbers of its own between the factors.  So z and dz of a group are made, used, and let
    go; no sum is cut, and only the first factor's product is made twice.
    """
    k, l, r = _read(call).axes  # noqa: E741
    return _gradients(grad, call, wanted, blocks_at_a_time(call, len(call.x) * l * r, k), None)


def _gradients(
    grad: Tensor, call: Applied, wanted: Sequence[bool], size: int, kept: Tensor | None
) -> list[Tensor | None]:
    """The gradients that are wanted, ``size`` blocks at a time; ``kept`` is z (tokens, l, k r), or None."""
    monarch = _read(call)
    k, l, r = monarch.axes  # noqa: E741
    first, second, _ = monarch
    tokens, inputs, outputs = len(call.x), first.shape[3], second.shape[1]
    grad = _in_blocks(grad, monarch)
    x = padded(call.x, k * inputs).view(tokens, k, inputs)
    dx = grad.new_empty(tokens, k, inputs) if wanted[0] else None
    of_first = first.new_empty(k, r, l, inputs) if wanted[1] else None
    of_second = second.new_empty(l, 1, outputs, k * r) if wanted[2] else None
    for start in range(0, k, size):
        blocks = slice(start, min(start + size, k))
        columns = slice(start * r, blocks.stop * r)
        count = blocks.stop - start
        if of_second is not None:
            z = _between(x[:, blocks], first[blocks]).flatten(2) if kept is None else kept[..., columns]
            tiles = matrix_gradient_cut(second, tokens, l, (1, outputs), count * r)
            matrix_gradients(grad, z, of_second[..., columns], tiles=tiles)
            del z
        if of_first is None and dx is None:
            continue
        dz = grad.new_empty(tokens, count, l, r)
        tiles = product_tiles(second, tokens, (count, r), (1, outputs))
        matrix_products(grad[:, :, None], second[:, None, :, columns], dz.transpose(1, 2), turned=True, tiles=tiles)
        if of_first is not None:
            tiles = matrix_gradient_cut(first, tokens, count, (l, r), inputs)
            matrix_gradients(dz.flatten(2), x[:, blocks], of_first[blocks].transpose(1, 2), tiles=tiles)
        if dx is not None:
            tiles = product_tiles(first, tokens, (1, inputs), (l, r))
            matrix_products(dz, first[blocks], dx[:, blocks, None], turned=True, tiles=tiles)
        del dz
    return [None if dx is None else dx.flatten(1)[:, : call.x.shape[1]], of_first, of_second]


def blocks_at_a_time(call: Applied, numbers: int, blocks: int) -> int:
    """Blocks of a group, whose z has ``numbers`` each, so that groups are about equal and take no more than the dense
    layer's gradient of its weight would beyond those of the factors; one block where that is less."""
    dense = call.x.shape[1] * call.static[0]
    room = dense - sum(factor.numel() for factor in call.factors)
    groups = -(-blocks // max(1, room // max(numbers, 1)))
    return -(-blocks // groups)


def _read(call: Applied) -> _Monarch:
    one, two = (FactorShape(*factor.shape) for factor in call.factors)
    first = call.factors[0].reshape(one.a, one.i // two.d, two.d, one.columns).transpose(1, 2)
    return _Monarch(first, call.factors[1].reshape(two.d, two.rows, two.columns), strided=_strided(two))


def _strided(second: FactorShape) -> bool:
    return second.i > 1 and second.d > 1


def _between(x: Tensor, first: Tensor) -> Tensor:
    """(tokens, l, k, r) of x (tokens, k, inputs)."""
    tokens, (k, l, r, inputs) = len(x), first.shape  # noqa: E741
    z = x.new_empty(tokens, l, k, r)
    tiles = product_tiles(first, tokens, (l, r), (1, inputs))
    matrix_products(x[:, :, None], first, z.transpose(1, 2), tiles=tiles)
    return z


def _in_blocks(rows: Tensor, monarch: _Monarch) -> Tensor:
    """(N, l, outputs) of (N, out)."""
    blocks, outputs, _ = monarch.second.shape
    rows = padded(rows, blocks * outputs)
    return turned(rows.view(-1, outputs, blocks)) if monarch.strided else rows.view(-1, blocks, outputs)

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
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from structfly.lowering.block_products.matrices import matrix_gradients, matrix_products
from structfly.lowering.block_products.matrix_tiles import matrix_gradient_cut, product_tiles
from structfly.lowering.block_products.support import padded, why_no_products
from structfly.lowering.block_products.turned import turned
from structfly.lowering.kronecker.reference import FactorShape
from structfly.lowering.layer_products import Applied

# Columns of a matrix up to which a product in tiles of many matrices is faster than a copy that orders its outputs.
_NARROW = 128


_SHAPES = 1024  # of two factors, whose axes are remembered: every call asks for some


class _Axes(NamedTuple):
    """What the factors' shapes say.

    Attributes:
        k, l, r: blocks of inputs and of outputs, and numbers from each to each.
        inputs, outputs: of a block.
        strided: whether a block's outputs are every l-th of all rather than a run.
    """

    k: int
    l: int  # noqa: E741 - the field's name for it
    r: int
    inputs: int
    outputs: int
    strided: bool


def why_not(factors: Sequence[Tensor], tf32: bool) -> str:
    """Why products with these factors are not made so, or ""; ``tf32`` as :func:`why_no_products` has it."""
    shapes = tuple([factor.shape for factor in factors])
    if why := _why_no_monarch(shapes):
        return why
    axes = _axes(*shapes)
    return why_no_products(factors[0], (axes.inputs, axes.r, axes.outputs), tf32)


@lru_cache(maxsize=_SHAPES)
def _why_no_monarch(shapes: tuple[torch.Size, ...]) -> str:
    if len(shapes) != 2:
        return f"the chain has {len(shapes)} factors; a Monarch matrix has 2"
    one, two = (FactorShape(*shape) for shape in shapes)
    if one.d > 1 or two.a > 1 or one.q > 1 or two.p > 1 or one.i % two.d or two.j * two.d != one.features_out:
        return f"{two} after {one} is no Monarch matrix, whose factors are block diagonal but for one permutation"
    return ""


@lru_cache(maxsize=_SHAPES)
def _axes(first: torch.Size, second: torch.Size) -> _Axes:
    one, two = FactorShape(*first), FactorShape(*second)
    return _Axes(one.a, two.d, one.i // two.d, one.columns, two.rows, strided=two.i > 1 and two.d > 1)


def worth_a_copy(factors: Sequence[Tensor]) -> bool:
    """Whether outputs that stand apart are worth a copy that orders them, where products along axes need none."""
    axes = _axes(factors[0].shape, factors[1].shape)
    return not axes.strided or axes.k * axes.r > _NARROW


def between(call: Applied) -> list[Tensor]:
    """z, under the shape in which torch's products keep it."""
    axes, tokens = _axes_of(call), len(call.x)
    x = padded(call.x, axes.k * axes.inputs).view(tokens, axes.k, axes.inputs)
    return [_between(x, _first(call, axes)).view(axes.k, axes.r * axes.l, tokens)]


def finish(call: Applied, between: Sequence[Tensor]) -> Tensor:
    """y; outputs that stand apart are put in order after the product."""
    axes, tokens, (out_features,) = _axes_of(call), len(call.x), call.static
    k, l, r, _, outputs, strided = axes  # noqa: E741
    second = call.factors[1].reshape(l, 1, outputs, k * r)
    y = call.x.new_empty(tokens, l, 1, outputs)
    bias = call.bias if call.bias is None else _in_blocks(call.bias[None], axes)[0]
    tiles = product_tiles(second, tokens, (1, outputs), (1, k * r))
    z = between[0].view(tokens, l, 1, k * r)
    matrix_products(z, second, y, bias=bias, activation=call.activation, tiles=tiles)
    made = turned(y.squeeze(2)) if strided else y
    return made.view(tokens, l * outputs)[:, :out_features].contiguous()


def backward(grad: Tensor, call: Applied, between: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """The gradients that are wanted, of x and each factor."""
    axes = _axes_of(call)
    kept = between[0].view(len(call.x), axes.l, axes.k * axes.r)
    return _gradients(grad, call, axes, wanted, axes.k, kept)


def backward_in_groups(grad: Tensor, call: Applied, wanted: Sequence[bool]) -> list[Tensor | None]:
    """The same where nothing was kept: of a group of the first factor's blocks at a time.

    A block of inputs leads to numbers of its own between the factors.  So z and dz of a group are made, used, and let
    go; no sum is cut, and only the first factor's product is made twice.
    """
    axes = _axes_of(call)
    size = blocks_at_a_time(call, len(call.x) * axes.l * axes.r, axes.k)
    return _gradients(grad, call, axes, wanted, size, None)


def _gradients(
    grad: Tensor, call: Applied, axes: _Axes, wanted: Sequence[bool], size: int, kept: Tensor | None
) -> list[Tensor | None]:
    """The gradients that are wanted, ``size`` blocks at a time; ``kept`` is z (tokens, l, k r), or None."""
    k, l, r, inputs, outputs, _ = axes  # noqa: E741
    tokens, first, second = len(call.x), _first(call, axes), call.factors[1].reshape(l, 1, outputs, k * r)
    grad = _in_blocks(grad, axes)
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
        matrix_products(grad[:, :, None], second[..., columns], dz.transpose(1, 2), turned=True, tiles=tiles)
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


def _axes_of(call: Applied) -> _Axes:
    first, second = call.factors
    return _axes(first.shape, second.shape)


def _first(call: Applied, axes: _Axes) -> Tensor:
    """The first factor (k, l, r, inputs), with its rows in the order in which they are taken."""
    return call.factors[0].reshape(axes.k, axes.r, axes.l, axes.inputs).transpose(1, 2)


def _between(x: Tensor, first: Tensor) -> Tensor:
    """(tokens, l, k, r) of x (tokens, k, inputs)."""
    tokens, (k, l, r, inputs) = len(x), first.shape  # noqa: E741
    z = x.new_empty(tokens, l, k, r)
    tiles = product_tiles(first, tokens, (l, r), (1, inputs))
    matrix_products(x[:, :, None], first, z.transpose(1, 2), tiles=tiles)
    return z


def _in_blocks(rows: Tensor, axes: _Axes) -> Tensor:
    """(N, l, outputs) of (N, out)."""
    rows = padded(rows, axes.l * axes.outputs)
    return turned(rows.view(-1, axes.outputs, axes.l)) if axes.strided else rows.view(-1, axes.l, axes.outputs)

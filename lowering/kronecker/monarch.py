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
from structfly.lowering.layer_products import Applied, room_beside_factors

# Columns of a matrix up to which a product in tiles of many matrices is faster than a copy that orders its outputs.
_NARROW = 128
_ROWS = 1024  # which make 128 tiles of 128 x 256 of 4096 features, nearly one for each processor of an H100

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
    products = _Backward(grad, call)
    kept = between[0].view(products.tokens, products.axes.l, products.axes.k * products.axes.r)
    return products.in_groups(wanted, products.axes.k, kept)


def backward_again(grad: Tensor, call: Applied, wanted: Sequence[bool]) -> list[Tensor | None]:
    """The same where nothing was kept: only the first factor's product is made twice, and no sum is cut."""
    products = _Backward(grad, call)
    if wanted[0] and products.width <= products.axes.k * products.axes.inputs:
        return products.in_place(wanted, rows_at_a_time(call, products.width))
    numbers = products.tokens * products.width // products.axes.k
    return products.in_groups(wanted, blocks_at_a_time(call, numbers, products.axes.k))


class _Backward:
    """The products of a backward.

    Attributes:
        axes: of the factors.
        tokens: how many.
        width: numbers of a token between the factors.
        x: (tokens, k, inputs).
    """

    def __init__(self, grad: Tensor, call: Applied) -> None:
        self.axes = axes = _axes_of(call)
        self.tokens, self.width = len(call.x), axes.k * axes.l * axes.r
        self.x = padded(call.x, axes.k * axes.inputs).view(self.tokens, axes.k, axes.inputs)
        self._grad, self._features = _in_blocks(grad, axes), call.x.shape[1]
        self._first = _first(call, axes)
        self._second = call.factors[1].reshape(axes.l, 1, axes.outputs, axes.k * axes.r)

    def in_groups(self, wanted: Sequence[bool], size: int, kept: Tensor | None = None) -> list[Tensor | None]:
        """The gradients that are wanted, of ``size`` blocks of the first factor at a time.

        A block of inputs leads to numbers of its own between the factors.  So z and dz of a group are made, used, and
        let go; z is not made where it was ``kept``, (tokens, l, k r).
        """
        k, l, r, *_ = self.axes  # noqa: E741
        dx, of_first, of_second = self._empty(wanted)
        for start in range(0, k, size):
            blocks = slice(start, min(start + size, k))
            columns, count = slice(start * r, blocks.stop * r), blocks.stop - start
            if of_second is not None:
                z = _between(self.x[:, blocks], self._first[blocks]).flatten(2) if kept is None else kept[..., columns]
                self._make_of_second(z, of_second[..., columns], count)
                del z
            if of_first is None and dx is None:
                continue
            dz = self.x.new_empty(self.tokens, count, l, r)
            self._make_dz(dz, columns)
            if of_first is not None:
                self._make_of_first(dz, blocks, of_first[blocks])
            if dx is not None:
                self._make_dx(dz, self._first[blocks], dx[:, blocks])
            del dz
        return self._made(dx, of_first, of_second)

    def in_place(self, wanted: Sequence[bool], size: int) -> list[Tensor | None]:
        """The same with z, then dz, and then dx in one place, which is ``size`` rows larger than dx alone.

        dz lies at its end, and dx is made from its beginning on, of ``size`` rows at a time.  Where rows of dz are no
        wider than those of dx, all that dx takes the place of is of rows of dz before those that it is made of:

            dx of rows i..i + size ends at       (i + size) width of dx,
            their dz begins at                   tokens width of dx + size width of dz - (tokens - i) width of dz.
        """
        k, l, r, inputs, *_ = self.axes  # noqa: E741
        _, of_first, of_second = self._empty((False, *wanted[1:]))
        place = self.x.new_empty(self.tokens * k * inputs + min(size, self.tokens) * self.width)
        between = place[len(place) - self.tokens * self.width :]
        if of_second is not None:
            z = _between(self.x, self._first, between.view(self.tokens, l, k, r))
            self._make_of_second(z.flatten(2), of_second, k)
        dz = between.view(self.tokens, k, l, r)
        self._make_dz(dz, slice(None))
        if of_first is not None:
            self._make_of_first(dz, slice(None), of_first)
        dx = place[: self.tokens * k * inputs].view(self.tokens, k, inputs)
        for start in range(0, self.tokens, size):
            rows = slice(start, start + size)
            self._make_dx(dz[rows], self._first, dx[rows])
        return self._made(dx, of_first, of_second)

    def _empty(self, wanted: Sequence[bool]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        k, l, r, inputs, outputs, _ = self.axes  # noqa: E741
        sizes = ((self.tokens, k, inputs), (k, r, l, inputs), (l, 1, outputs, k * r))
        dx, of_first, of_second = (
            self.x.new_empty(size) if wants else None for size, wants in zip(sizes, wanted, strict=True)
        )
        return dx, of_first, of_second

    def _made(self, dx: Tensor | None, *of_factors: Tensor | None) -> list[Tensor | None]:
        return [None if dx is None else dx.flatten(1)[:, : self._features], *of_factors]

    def _make_of_second(self, z: Tensor, out: Tensor, blocks: int) -> None:
        """(l, 1, outputs, columns) of z (tokens, l, columns), those of so many blocks of the first factor."""
        _, l, r, _, outputs, _ = self.axes  # noqa: E741
        tiles = matrix_gradient_cut(self._second, self.tokens, l, (1, outputs), blocks * r)
        matrix_gradients(self._grad, z, out, tiles=tiles)

    def _make_dz(self, dz: Tensor, columns: slice) -> None:
        """(tokens, blocks, l, r), by such columns of the second factor's matrices."""
        _, _, r, _, outputs, _ = self.axes
        tiles = product_tiles(self._second, self.tokens, (dz.shape[1], r), (1, outputs))
        grad = self._grad[:, :, None]
        matrix_products(grad, self._second[..., columns], dz.transpose(1, 2), turned=True, tiles=tiles)

    def _make_of_first(self, dz: Tensor, blocks: slice, out: Tensor) -> None:
        """(blocks, r, l, inputs) of dz (tokens, blocks, l, r)."""
        _, l, r, inputs, *_ = self.axes  # noqa: E741
        tiles = matrix_gradient_cut(self._first, self.tokens, len(out), (l, r), inputs)
        matrix_gradients(dz.flatten(2), self.x[:, blocks], out.transpose(1, 2), tiles=tiles)

    def _make_dx(self, dz: Tensor, first: Tensor, out: Tensor) -> None:
        """(rows, blocks, inputs) of dz (rows, blocks, l, r)."""
        _, l, r, inputs, *_ = self.axes  # noqa: E741
        tiles = product_tiles(first, len(dz), (1, inputs), (l, r))
        matrix_products(dz, first, out[:, :, None], turned=True, tiles=tiles)


def blocks_at_a_time(call: Applied, numbers: int, blocks: int) -> int:
    """Blocks of a group, whose z has ``numbers`` each, so that groups are about equal and take no more than the dense
    layer's gradient of its weight would beyond those of the factors; one block where that is less."""
    groups = -(-blocks // max(1, room_beside_factors(call) // max(numbers, 1)))
    return -(-blocks // groups)


def rows_at_a_time(call: Applied, width: int) -> int:
    """Rows of which dx is made at a time, with dz of so many beside it: a multiple of what gives all processors a tile,
    and no more than three quarters of what the dense layer's gradient of its weight would take beyond those of the
    factors, if that is as many."""
    return max(1, room_beside_factors(call) * 3 // (4 * width * _ROWS)) * _ROWS


def _axes_of(call: Applied) -> _Axes:
    first, second = call.factors
    return _axes(first.shape, second.shape)


def _first(call: Applied, axes: _Axes) -> Tensor:
    """The first factor (k, l, r, inputs), with its rows in the order in which they are taken."""
    return call.factors[0].reshape(axes.k, axes.r, axes.l, axes.inputs).transpose(1, 2)


def _between(x: Tensor, first: Tensor, out: Tensor | None = None) -> Tensor:
    """z (tokens, l, k, r), in ``out`` if that is given, of x (tokens, k, inputs)."""
    tokens, (k, l, r, inputs) = len(x), first.shape  # noqa: E741
    z = x.new_empty(tokens, l, k, r) if out is None else out
    tiles = product_tiles(first, tokens, (l, r), (1, inputs))
    matrix_products(x[:, :, None], first, z.transpose(1, 2), tiles=tiles)
    return z


def _in_blocks(rows: Tensor, axes: _Axes) -> Tensor:
    """(N, l, outputs) of (N, out)."""
    rows = padded(rows, axes.l * axes.outputs)
    return turned(rows.view(-1, axes.outputs, axes.l)) if axes.strided else rows.view(-1, axes.l, axes.outputs)

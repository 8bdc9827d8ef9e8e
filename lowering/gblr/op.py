"""``structfly::gblr_v4``: y = L P (R^T x) + bias, L and R tile-sparse, P a permutation; see
:mod:`structfly.lowering.gblr.reference`.

With z = P R^T x and g the gradient with respect to y,

    dL = g z^T at L's tiles,    dz = P^T L^T g,    dR = x dz^T at R's tiles,    dx = R dz.

z and dz are held with a row for each component and the tokens along it: a permutation moves whole rows.
On GPUs the products are generated where :func:`~structfly.lowering.gblr.generated.why_not` has nothing against it, and
a backward that kept nothing makes all of this in dx's memory: :mod:`structfly.lowering.gblr.in_place`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from structfly.lowering.block_products.support import padded_rows
from structfly.lowering.gblr import generated, in_place, tile_products
from structfly.lowering.gblr.tile_products import inverse
from structfly.lowering.layer_op import LayerOp
from structfly.lowering.layer_products import Applied, InChunks, is_traced
from structfly.lowering.remembered import remembered


def _between(call: Applied) -> list[Tensor]:
    right, right_index, _, _, order = call.factors
    by = tile_products if _plain(call, right, call.x) else generated
    return [by.collect(call.x, right, right_index, order)]


def _finish(call: Applied, between: Sequence[Tensor]) -> Tensor:
    _, _, left, left_index, _ = call.factors
    z, out_features = between[0][:, : len(call.x)], call.static[0]
    if _plain(call, left):
        y = tile_products.spread(z, left, left_index, out_features)
        return y if call.bias is None else y.add_(call.bias)
    return generated.spread(z, left, left_index, out_features, call.bias, call.activation)


def _backward(grad: Tensor, call: Applied, between: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    x, (right, right_index, left, left_index, order) = call.x, call.factors
    of_left, of_right = (tile_products if _plain(call, each, grad, x) else generated for each in (left, right))
    made: list[Tensor | None] = [None] * 6
    if wanted[0] or wanted[1]:
        dz = of_left.collect(grad, left, left_index, remembered(inverse, order))[:, : len(x)]
        made[0] = of_right.spread(dz, right, right_index, x.shape[1]) if wanted[0] else None
        made[1] = of_right.tiles_of(x, dz, right, right_index) if wanted[1] else None
    if wanted[3]:
        made[3] = of_left.tiles_of(grad, between[0][:, : len(x)], left, left_index)
    return made


def _plain(call: Applied, tiles: Tensor, *others: Tensor) -> bool:
    """Whether torch makes the products, because it must or because they are to be differentiated."""
    return is_traced(tiles, *others) or bool(generated.why_not(tiles, call.tf32))


def _why_not_in_place(call: Applied) -> str:
    """Of calls that are not differentiated."""
    right, _, left, _, _ = call.factors
    return generated.why_not(right, call.tf32) or generated.why_not(left, call.tf32)


def _kept_shapes(rows: int, shapes: Sequence[Any], _: Sequence[int]) -> list[tuple[int, ...]]:
    return [(shapes[4][0], padded_rows(rows))]


def _multiply_adds(rows: int, shapes: Sequence[Any], _: Sequence[int]) -> tuple[int, int]:
    right, _, left, _, _ = shapes
    first, second = (rows * int(count) * int(tile) * int(group) for count, tile, group in (right, left))
    return first, second


GBLR = LayerOp(
    "gblr_v4",
    between=_between,
    finish=_finish,
    backward=_backward,
    out_features=lambda _, static: static[0],
    kept_shapes=_kept_shapes,
    multiply_adds=_multiply_adds,
    adds_bias=True,
    why_no_epilogue=lambda call: generated.why_not(call.factors[2], call.tf32),
    in_chunks=InChunks(_why_not_in_place, in_place.backward),
)
"""Takes ``right`` (right_tiles, tile, group), ``right_index`` (2, right_tiles), ``left`` (left_tiles, tile, group),
``left_index`` (2, left_tiles) and ``order`` (groups * group,); static: out_features."""

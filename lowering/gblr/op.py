"""``structfly::gblr_v1``: y = L (R^T x) + bias, L and R tile-sparse; see :mod:`structfly.lowering.gblr.reference`.

With z = R^T x and g the gradient with respect to y,

    dL = g z^T at L's tiles,    dz = L^T g,    dR = x dz^T at R's tiles,    dx = R dz.

On GPUs the products are generated where :func:`~structfly.lowering.gblr.generated.why_not` has nothing against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from structfly.lowering.gblr import generated, tile_products
from structfly.lowering.layer_op import Applied, LayerOp


def _between(call: Applied) -> list[Tensor]:
    right, right_index, _, _ = call.factors
    by = tile_products if _plain(right, call.x) else generated
    return [by.collect(call.x, right, right_index, call.static[1])]


def _finish(call: Applied, between: Sequence[Tensor]) -> Tensor:
    _, _, left, left_index = call.factors
    by = tile_products if _plain(left) else generated
    return by.spread(between[0], left, left_index, call.static[0])


def _backward(grad: Tensor, call: Applied, between: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    x, (right, right_index, left, left_index), (_, groups) = call
    (z,) = between
    of_left, of_right = (tile_products if _plain(each, grad, x) else generated for each in (left, right))
    dz = of_left.collect(grad, left, left_index, groups) if wanted[0] or wanted[1] else None
    return [
        of_right.spread(dz, right, right_index, x.shape[1]) if dz is not None and wanted[0] else None,
        of_right.tiles_of(x, dz, right, right_index) if dz is not None and wanted[1] else None,
        None,
        of_left.tiles_of(grad, z, left, left_index) if wanted[3] else None,
        None,
    ]


def _plain(tiles: Tensor, *others: Tensor) -> bool:
    """Whether torch makes the products, because it must or because they are to be differentiated."""
    again = torch.is_grad_enabled() and any(each.requires_grad for each in (tiles, *others))
    return again or bool(generated.why_not(tiles))


def _kept_shapes(rows: int, shapes: Sequence[Any], static: Sequence[int]) -> list[tuple[int, ...]]:
    return [(rows, static[1] * shapes[0][2])]


def _multiply_adds(rows: int, shapes: Sequence[Any], _: Sequence[int]) -> tuple[int, int]:
    right, _, left, _ = shapes
    first, second = (rows * int(count) * int(tile) * int(group) for count, tile, group in (right, left))
    return first, second


GBLR = LayerOp(
    "gblr_v1",
    between=_between,
    finish=_finish,
    backward=_backward,
    out_features=lambda _, static: static[0],
    kept_shapes=_kept_shapes,
    multiply_adds=_multiply_adds,
)
"""Takes ``right`` (right_tiles, tile, group), ``right_index`` (2, right_tiles), ``left`` (left_tiles, tile, group) and
``left_index`` (2, left_tiles); static: out_features, groups."""

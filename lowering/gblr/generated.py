"""Products with a tile-sparse matrix generated for GPUs: every tile in its place; the same bits every time.

Functions, arguments and results are those of :mod:`structfly.lowering.gblr.tile_products`.  M's tiles that stand in one
group are summed over by ``collect``, those that stand in one tile of rows by ``spread``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from structfly.lowering.block_products.gradient_places import Gradients, Places
from structfly.lowering.block_products.gradients import about, block_gradients, placed
from structfly.lowering.block_products.listing import Listing, listed
from structfly.lowering.block_products.products import block_sums
from structfly.lowering.block_products.support import padded, padded_rows, why_no_products
from structfly.lowering.block_products.tiles import sum_cut
from structfly.lowering.remembered import remembered


def why_not(tiles: Tensor, tf32: bool) -> str:
    """Why products with tiles (count, tile, group) are not generated, or ""; ``tf32`` as :func:`why_no_products` has
    it."""
    return why_no_products(tiles, tiles.shape[1:], tf32)


def collect(dense: Tensor, tiles: Tensor, index: Tensor, order: Tensor, out: Tensor | None = None) -> Tensor:
    """(dense M)^T with its rows put where ``order`` says, in ``out`` if that is given: the product's tiles are stored
    transposed, so that a row that goes elsewhere is still as long as a tile."""
    _, tile, group = tiles.shape
    made = dense.new_empty(len(order), padded_rows(len(dense))) if out is None else out
    groups = len(order) // group
    members = remembered(_by_group, index, groups)
    cut = sum_cut(tiles, len(dense), members, group, tile, turned=True)
    block_sums(_in_tiles(dense, tile), tiles, made, members, turned=True, rows=order, cut=cut)
    return made


def spread(
    components: Tensor,
    tiles: Tensor,
    index: Tensor,
    features: int,
    bias: Tensor | None = None,
    activation: str = "",
) -> Tensor:
    """The activation of ``components`` (groups * group, N) transposed, times M^T, + bias (features,): (N, features)."""
    made = components.new_empty(components.shape[1], padded_features(features, tiles))
    spread_to(made, components, tiles, index, bias, activation)
    return made[:, :features].contiguous()


def spread_to(
    out: Tensor,
    components: Tensor,
    tiles: Tensor,
    index: Tensor,
    bias: Tensor | None = None,
    activation: str = "",
) -> None:
    """The same in ``out`` (N, :func:`padded_features`), of N of the tokens."""
    _, tile, group = tiles.shape
    made = out.unflatten(1, (-1, tile))
    places = made.shape[1]
    if bias is not None:
        bias = padded(bias[None], places * tile).view(places, tile)
    of_groups = components.unflatten(0, (-1, group))
    members = remembered(_by_place, index, places)
    cut = sum_cut(tiles, len(made), members, tile, group)
    block_sums(of_groups, tiles, made, members, a_turned=True, bias=bias, activation=activation, cut=cut)


def padded_features(features: int, tiles: Tensor) -> int:
    """Those of whole tiles."""
    return -(-features // tiles.shape[1]) * tiles.shape[1]


def tiles_of(
    dense: Tensor,
    components: Tensor,
    tiles: Tensor,
    index: Tensor,
    room: Tensor | None = None,
    spare: int | None = None,
) -> Tensor:
    """The tiles of (``components`` ``dense``)^T, shaped as ``tiles``; rows beyond M's are 0.  ``room`` and ``spare``
    are as in :func:`block_gradients`."""
    _, tile, group = tiles.shape
    made = torch.empty_like(tiles)
    in_tiles, of_groups = _in_tiles(dense, tile), components.unflatten(0, (-1, group))
    shape = Gradients(in_tiles.shape[1], len(of_groups), tile, group, itemsize=tiles.element_size())
    places = remembered(_placed, index, shape, about(len(dense)))
    block_gradients(in_tiles, of_groups, made, places, b_turned=True, room=room, spare=spare)
    return made


def _in_tiles(dense: Tensor, tile: int) -> Tensor:
    """``dense`` (N, features) as (N, places, tile), with zeros beyond its features."""
    places = -(-dense.shape[1] // tile)
    return padded(dense, places * tile).view(len(dense), places, tile)


def _by_group(index: Tensor, groups: int) -> Listing:
    return listed(index[0], index[1], groups)


def _by_place(index: Tensor, places: int) -> Listing:
    return listed(index[1], index[0], places)


def _placed(index: Tensor, shape: Gradients, tokens: int) -> Places:
    return placed(index[1], index[0], shape, tokens)

"""Products with a tile-sparse matrix M (features, groups * group) that stands as its tiles alone.

``tiles`` (count, tile, group) are its parts that are not zero and ``index`` (2, count), int32, says where they stand:
``index[0]`` which group of columns, ``index[1]`` which tile of rows.  Rows of the last tile beyond M's are left out.

Neighbouring tiles of one group that also follow each other in ``tiles`` are one product with a slice of the dense
operand: nothing is gathered or copied.  The index is read on the host once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from structfly.lowering.block_products.support import padded_rows
from structfly.lowering.remembered import remembered


class _Run(NamedTuple):
    """Tiles of one group: ``tiles[first:first + count]`` are the rows of M from ``start`` to ``stop``."""

    group: slice
    rows: slice
    tiles: slice


def _runs(tiles: Tensor, index: Tensor, features: int) -> Iterator[_Run]:
    _, tile, group = tiles.shape
    groups, places = remembered(Tensor.tolist, index)
    first = 0
    for end in range(1, len(groups) + 1):
        if end < len(groups) and groups[end] == groups[first] and places[end] == places[end - 1] + 1:
            continue
        start, stop = places[first] * tile, min((places[end - 1] + 1) * tile, features)
        of = slice(groups[first] * group, (groups[first] + 1) * group)
        yield _Run(of, slice(start, stop), slice(first * tile, first * tile + stop - start))
        first = end


def _sums(like: Tensor, rows: int, columns: int) -> Tensor:
    """Zeros that sums are collected in: float32 for the dtypes that would round every term."""
    wide = torch.promote_types(like.dtype, torch.float32)
    return like.new_zeros(rows, columns, dtype=wide)


def _add(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def collect(dense: Tensor, tiles: Tensor, index: Tensor, order: Tensor) -> Tensor:
    """(dense M)^T with its rows put where ``order`` says.

    Args:
        dense: (N, features).
        order: int32 (groups * group,), a permutation.

    Returns:
        (groups * group, :func:`~structfly.lowering.block_products.support.padded_rows` of N), row ``order[i]`` of which
        is column i of the product.
    """
    flat, count = tiles.flatten(0, 1), len(dense)
    result = _sums(dense, len(order), padded_rows(count))
    for run in _runs(tiles, index, dense.shape[1]):
        _add(result[run.group, :count], flat[run.tiles].t(), dense[:, run.rows].t())
    made = result.to(dense.dtype)
    return made if remembered(_in_order, order) else made.index_select(0, remembered(inverse, order))


def spread(components: Tensor, tiles: Tensor, index: Tensor, features: int) -> Tensor:
    """``components`` (groups * group, N) transposed, times M^T: (N, features)."""
    flat = tiles.flatten(0, 1)
    result = _sums(components, components.shape[1], features)
    for run in _runs(tiles, index, features):
        _add(result[:, run.rows], components[run.group].t(), flat[run.tiles].t())
    return result.to(components.dtype)


def tiles_of(dense: Tensor, components: Tensor, tiles: Tensor, index: Tensor) -> Tensor:
    """The tiles of (``components`` ``dense``)^T, shaped as ``tiles``: the gradient of both products above."""
    made = torch.zeros_like(tiles)
    flat = made.view(-1, tiles.shape[2])
    for run in _runs(tiles, index, dense.shape[1]):
        flat[run.tiles] = dense[:, run.rows].t() @ components[run.group].t()
    return made


def inverse(order: Tensor) -> Tensor:
    """The permutation int32 that undoes this one."""
    return order.argsort().to(torch.int32)


def _in_order(order: Tensor) -> bool:
    return bool((order.diff() == 1).all())


def dense_of(tiles: Tensor, index: Tensor, features: int, groups: int) -> Tensor:
    """M (features, groups * group)."""
    _, tile, group = tiles.shape
    places = -(-features // tile)
    whole = tiles.new_zeros(groups * places, tile, group)
    whole = whole.index_add(0, (index[0] * places + index[1]).long(), tiles)
    return whole.view(groups, places * tile, group).transpose(0, 1).reshape(places * tile, -1)[:features]

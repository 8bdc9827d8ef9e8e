"""How products with many matrices at once are cut."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor

from structfly.lowering.device_profile import device_model
from structfly.lowering.gemm import TORCH_MM, Library, Parts, Tiles, processors_of
from structfly.lowering.tuning.choice import INTERPRETED, SAFE

_HOPPER = (9, 0)
_LEAST_PART = 8  # columns: 16 bytes, the least that a descriptor moves
_SHAPES = 1024  # whose tiles are remembered: every call asks for some
PRODUCTS = Tiles(m=128, n=256, k=64, group=8, parts=2, warps=8, stages=4)
# Narrow, so that more processors read weights, in long steps, of which each has much under way.
FEW_TOKENS = Tiles(m=64, n=32, k=256, group=8, parts=1, warps=4, stages=4)
# The largest first; the next where a larger leaves processors without a tile.
GRADIENTS = (
    Tiles(m=128, n=256, k=64, group=8, parts=2, warps=8, stages=3),
    Tiles(m=128, n=128, k=64, group=8, parts=1, warps=8, stages=4),
    Tiles(m=64, n=128, k=64, group=8, parts=1, warps=4, stages=6),
    Tiles(m=64, n=64, k=64, group=8, parts=1, warps=4, stages=8),
)

# Of several small matrices at once: 16 neighbours of 16 bits are the least that memory moves as a whole, 32 bytes.
BATCH, _BATCH_SAFE = 16, 8
AXIS = Tiles(m=32, n=64, k=32, group=8, parts=1, warps=8, stages=2)
_AXIS_SAFE = Tiles(m=16, n=32, k=16, group=8, parts=1, warps=4, stages=2)
AXIS_GRADIENTS = Tiles(m=32, n=32, k=32, group=8, parts=1, warps=8, stages=3)
_AXIS_GRADIENTS_SAFE = Tiles(m=16, n=16, k=32, group=8, parts=1, warps=4, stages=2)

Axes = tuple[int, int]
"""A side's high and low axis."""


def product_tiles(like: Tensor, tokens: int, n: Axes, k: Axes, best: Tiles = PRODUCTS) -> Tiles:
    """Of products of ``tokens`` rows with matrices that have sides of such axes; ``best`` on Hopper for many rows."""
    return _product_tiles(like.device, like.element_size(), tokens, n, k, best)


@lru_cache(maxsize=_SHAPES)
def _product_tiles(device: torch.device, itemsize: int, tokens: int, n: Axes, k: Axes, best: Tiles) -> Tiles:
    capability = device_model(device).capability
    if capability is None:
        tiles = INTERPRETED
    elif tokens <= FEW_TOKENS.m:
        tiles = FEW_TOKENS
    else:
        tiles = best if capability == _HOPPER else SAFE
    tiles = tiles.for_itemsize(itemsize)
    columns = min(tiles.n, _most(n))
    parts = cast(Parts, min(tiles.parts, columns // _LEAST_PART))
    return replace(tiles, m=min(tiles.m, _enough(tokens)), n=columns, k=min(tiles.k, _most(k)), parts=parts)


def gradient_tiles(
    like: Tensor, tokens: int, matrices: int, m: Axes, n: int, best: tuple[Tiles, ...] = GRADIENTS
) -> Tiles:
    """Of the gradients of so many matrices, with rows of such axes and ``n`` columns, summed over ``tokens``; one of
    ``best`` on Hopper."""
    return _gradient_tiles(like.device, like.element_size(), tokens, matrices, m, n, best)


def matrix_gradient_cut(like: Tensor, tokens: int, matrices: int, m: Axes, n: int) -> Tiles | Library:
    """The same of products that torch can make as well: those of float32 are left to it.

    In TF32 tensor cores take operands as they lie only if their inner side is last, and here it is the tokens' for
    neither.  Generated products would take both through registers in every step: 48 KiB out of shared memory and into
    it for a tile of 128 by 256 in a step of 32, which takes at 128 bytes a cycle 768 of them, and the multiplications
    take 1024.
    """
    return TORCH_MM if like.dtype == torch.float32 else gradient_tiles(like, tokens, matrices, m, n)


@lru_cache(maxsize=_SHAPES)
def _gradient_tiles(
    device: torch.device, itemsize: int, tokens: int, matrices: int, m: Axes, n: int, best: tuple[Tiles, ...]
) -> Tiles:
    model = device_model(device)
    if model.capability is None:
        choices: tuple[Tiles, ...] = (INTERPRETED,)
    else:
        choices = best if model.capability == _HOPPER else (SAFE,)
    cut: list[Tiles] = []
    for tiles in (each.for_itemsize(itemsize) for each in choices):
        columns = min(tiles.n, _enough(n))
        parts = cast(Parts, min(tiles.parts, columns // _LEAST_PART))
        cut.append(replace(tiles, m=min(tiles.m, _most(m)), n=columns, k=min(tiles.k, _enough(tokens)), parts=parts))
    rows = m[0] * m[1]
    full = (t for t in cut if 10 * matrices * -(-rows // t.m) * -(-n // t.n) >= 9 * processors_of(device))
    return next(full, cut[-1])


def axis_tiles(like: Tensor, tokens: int, matrices: int, n: int, k: int) -> tuple[Tiles, int]:
    """Of products along an axis of a lattice with so many matrices (n, k), and how many of those a tile is of."""
    return _several(like.device, like.element_size(), AXIS, _AXIS_SAFE, matrices, m=tokens, n=n, k=k)


def axis_gradient_tiles(like: Tensor, tokens: int, matrices: int, m: int, n: int) -> tuple[Tiles, int]:
    """Of the gradients of so many matrices (m, n) along an axis, and how many of those a tile is of."""
    best, safe = AXIS_GRADIENTS, _AXIS_GRADIENTS_SAFE
    return _several(like.device, like.element_size(), best, safe, matrices, m=m, n=n, k=tokens)


@lru_cache(maxsize=_SHAPES)
def _several(
    device: torch.device, itemsize: int, best: Tiles, safe: Tiles, matrices: int, **sides: int
) -> tuple[Tiles, int]:
    capability = device_model(device).capability
    tiles, batch = (best, BATCH) if capability == _HOPPER else (safe, _BATCH_SAFE)
    least = {name: min(getattr(tiles, name), _enough(side)) for name, side in sides.items()}
    return replace(tiles, **least), min(batch * 2 // itemsize, max(8, _enough(matrices)))


def _enough(size: int) -> int:
    """The least side of a tile that holds so many."""
    return max(16, 1 << (size - 1).bit_length())


def _most(axes: Axes) -> int:
    """The longest side of a tile that is of use to such axes: where boxes are of the low axis only, that one's."""
    high, low = axes
    return _enough(low if high > 1 and low & (low - 1) else high * low)

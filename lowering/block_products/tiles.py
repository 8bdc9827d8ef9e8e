"""How products of blocks are cut."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from structfly.lowering.device_profile import device_model
from structfly.lowering.gemm import Tiles
from structfly.lowering.tuning.choice import INTERPRETED, SAFE

_HOPPER = (9, 0)
# Two programs a multiprocessor, each with three buffers of both operands: the index that a step loads takes a stage.
_SUMS = Tiles(m=128, n=128, k=64, group=4, parts=2, warps=4, stages=4)
_GRADIENTS = Tiles(m=128, n=256, k=64, group=8, parts=2, warps=8, stages=3)


def sum_tiles(like: Tensor, side_n: int, side_k: int) -> Tiles:
    """Of sums whose parts are ``side_n`` wide, of blocks ``side_k`` long."""
    return _cut(like, _SUMS, n=side_n, k=side_k)


def gradient_tiles(like: Tensor, side_m: int, side_n: int) -> Tiles:
    """Of gradients of blocks (side_m, side_n)."""
    return _cut(like, _GRADIENTS, m=side_m, n=side_n)


def _cut(like: Tensor, best: Tiles, **sides: int) -> Tiles:
    """``best`` where it runs, no side of a tile more than twice as long as what it is of."""
    model = device_model(like.device)
    if model.capability is None:
        return INTERPRETED
    tiles = best if model.capability == _HOPPER else SAFE
    most = {name: min(getattr(tiles, name), max(16, 1 << (side - 1).bit_length())) for name, side in sides.items()}
    return replace(tiles, **most)

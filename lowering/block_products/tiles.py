"""How products of blocks are cut."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from structfly.lowering.device_profile import device_model
from structfly.lowering.gemm import Tiles, processors_of
from structfly.lowering.tuning.choice import INTERPRETED, SAFE

_HOPPER = (9, 0)
_WHOLE_STEP = 64  # of an inner side; a shorter step where it leaves less of the last one empty


class Cut(NamedTuple):
    """Tiles, and how long a multiprocessor takes for an entry of them, against the first."""

    tiles: Tiles
    cost: float


# Means of benchmarks/results/block_products_h100.json over the products that fill all of these: 16384 tokens, sums of
# blocks 256x256, 256x1024 and 64x256 and gradients of blocks 256x256.
CUTS = (
    Cut(Tiles(m=128, n=256, k=64, group=8, parts=2, warps=8, stages=4), 1.0),
    Cut(Tiles(m=256, n=128, k=64, group=8, parts=2, warps=8, stages=4), 1.02),
    Cut(Tiles(m=128, n=128, k=64, group=8, parts=2, warps=4, stages=3, resident=2), 1.07),
    Cut(Tiles(m=256, n=64, k=64, group=2, parts=1, warps=4, stages=4), 1.21),
    Cut(Tiles(m=128, n=64, k=64, group=8, parts=1, warps=4, stages=4, resident=2), 1.57),
    Cut(Tiles(m=64, n=64, k=64, group=8, parts=1, warps=4, stages=4, resident=2), 1.78),
)
_SHORT_STEP = 32


def sum_tiles(like: Tensor, tokens: int, parts: int, side_n: int, side_k: int) -> Tiles:
    """Of sums (tokens, parts, side_n) of products with blocks ``side_k`` long."""
    return _best(like.device, (1, tokens), (parts, side_n), side_k)


def gradient_tiles(like: Tensor, blocks: int, side_m: int, side_n: int) -> Tiles:
    """Of gradients of blocks (blocks, side_m, side_n)."""
    return _best(like.device, (blocks, side_m), (1, side_n), _WHOLE_STEP)


@lru_cache(maxsize=1024)  # every call asks for some
def _best(device: torch.device, rows: tuple[int, int], columns: tuple[int, int], inner: int) -> Tiles:
    """What takes the busiest multiprocessor least; ``rows`` and ``columns`` are so many sides of such a length."""
    capability = device_model(device).capability
    if capability is None:
        return INTERPRETED
    if capability != _HOPPER:
        return SAFE
    processors = processors_of(device)

    def time(cut: Cut) -> float:
        tiles = cut.tiles
        count = rows[0] * -(-rows[1] // tiles.m) * columns[0] * -(-columns[1] // tiles.n)
        return -(-count // processors) * tiles.m * tiles.n * cut.cost

    tiles = min(CUTS, key=time).tiles
    return tiles if _padded(inner, _SHORT_STEP) == _padded(inner, _WHOLE_STEP) else _with_short_steps(tiles)


def _padded(side: int, step: int) -> int:
    return -(-side // step) * step


def _with_short_steps(tiles: Tiles) -> Tiles:
    """As many bytes on their way, in more steps."""
    stages = min(tiles.stages * tiles.k // _SHORT_STEP - 2, 6)
    return Tiles(tiles.m, tiles.n, _SHORT_STEP, tiles.group, tiles.parts, tiles.warps, stages, tiles.resident)

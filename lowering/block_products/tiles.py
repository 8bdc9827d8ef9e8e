"""How products of blocks are cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from structfly.lowering.block_products.gradient_places import Gradients, count_tiles
from structfly.lowering.block_products.ranges import ranges, rounds
from structfly.lowering.device_profile import device_model
from structfly.lowering.gemm import Tiles, processors_of, programs_on
from structfly.lowering.tuning.choice import INTERPRETED, SAFE

_HOPPER = (9, 0)
_WHOLE_STEP = 64  # of an inner side; a shorter step where it leaves less of the last one empty


class Cut(NamedTuple):
    """Tiles, and how long a multiprocessor takes for an entry of them, against the first.

    ``abreast``: how many of them, side by side, a program makes of gradients, which share what they take of a.
    """

    tiles: Tiles
    cost: float
    abreast: int = 1


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
    return _sum_tiles(like.device, tokens, parts, side_n, side_k)


@lru_cache(maxsize=1024)  # every call asks for some
def _sum_tiles(device: torch.device, tokens: int, parts: int, side_n: int, side_k: int) -> Tiles:
    def time(cut: Cut, processors: int) -> float:
        tiles = cut.tiles
        count = -(-tokens // tiles.m) * parts * -(-side_n // tiles.n)
        return -(-count // processors) * tiles.m * tiles.n * cut.cost

    tiles = _best(device, [cut for cut in CUTS if cut.abreast == 1], time).tiles
    short = tiles.k == _WHOLE_STEP and _padded(side_k, _SHORT_STEP) < _padded(side_k, _WHOLE_STEP)
    return _with_short_steps(tiles) if short else tiles


def gradient_cut(device: torch.device, tokens: int, members: Sequence[int], made: Gradients) -> Cut:
    """Of gradients summed over ``tokens``, where each part of a is in so many blocks."""

    def time(cut: Cut, processors: int) -> float:
        count = count_tiles(members, made, cut.tiles, cut.abreast)
        split = ranges(count, tokens, cut.tiles.k, programs_on(device, cut.tiles)) if count else 1
        return rounds(split, count, tokens, processors) * cut.tiles.m * cut.tiles.n * cut.abreast * cut.cost

    return _best(device, CUTS, time)


def _best(device: torch.device, cuts: Sequence[Cut], time: Callable[[Cut, int], float]) -> Cut:
    """What takes the busiest of so many multiprocessors least."""
    capability = device_model(device).capability
    if capability != _HOPPER:
        return Cut(INTERPRETED if capability is None else SAFE, 1.0)
    processors = processors_of(device)
    return min(cuts, key=lambda cut: time(cut, processors))


def _padded(side: int, step: int) -> int:
    return -(-side // step) * step


def _with_short_steps(tiles: Tiles) -> Tiles:
    """As many bytes on their way, in more steps."""
    stages = min(tiles.stages * tiles.k // _SHORT_STEP - 2, 6)
    return Tiles(tiles.m, tiles.n, _SHORT_STEP, tiles.group, tiles.parts, tiles.warps, stages, tiles.resident)

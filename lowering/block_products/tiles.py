"""How products of blocks are cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from structfly.lowering.block_products.gradient_places import Cutting, Gradients, count_tiles
from structfly.lowering.block_products.ranges import ranges, rounds
from structfly.lowering.device_profile import device_model
from structfly.lowering.gemm import Tiles, processors_of, programs_on
from structfly.lowering.tuning.choice import INTERPRETED, SAFE

_HOPPER = (9, 0)
_WHOLE_STEP, _SHORT_STEP = 64, 32  # of an inner side


class Cut(NamedTuple):
    """Tiles, and what they cost.

    Attributes:
        cost: how long a multiprocessor takes for an entry of them, against the first of its list.
        abreast: how many of them, side by side, a program makes of gradients, which share what they take of a.
        reaching: how many times as long it takes where tiles reach beyond a side of b that its rows lie along.
        spans: whether tiles of gradients reach over parts of b, as :class:`Cutting` has it.
    """

    tiles: Tiles
    cost: float
    abreast: int = 1
    reaching: float = 1.0
    spans: bool = False

    @property
    def cutting(self) -> Cutting:
        """Of gradients."""
        return Cutting(self.tiles, self.abreast, self.spans)


# Costs are about the means of benchmarks/results/block_products_h100.json, at 16384 tokens or more, over the products
# that leave none of a cut's tiles partly empty, each against the first cut there, or one that was measured against it
# elsewhere; those of tiles that reach beyond a side are of the products there that do.
SUMS = (
    Cut(Tiles(m=128, n=256, k=64, group=8, parts=2, warps=8, stages=4), 1.0),
    Cut(Tiles(m=256, n=128, k=64, group=8, parts=2, warps=8, stages=4), 1.06),
    Cut(Tiles(m=128, n=128, k=64, group=8, parts=2, warps=4, stages=3, resident=2), 1.01, reaching=1.2),
    Cut(Tiles(m=256, n=64, k=64, group=2, parts=1, warps=4, stages=4), 1.27),
    Cut(Tiles(m=128, n=64, k=64, group=8, parts=1, warps=4, stages=4, resident=2), 1.69),
    Cut(Tiles(m=64, n=64, k=64, group=8, parts=1, warps=4, stages=4, resident=2), 1.84),
)
# Where steps of 64 leave more of an inner side's last one empty than steps of 32.
SHORT_SUMS = (
    Cut(Tiles(m=128, n=128, k=32, group=8, parts=2, warps=4, stages=5, resident=2), 1.0),
    Cut(Tiles(m=256, n=128, k=32, group=8, parts=2, warps=8, stages=6), 1.01),
    Cut(Tiles(m=128, n=256, k=32, group=8, parts=2, warps=8, stages=6), 0.93),
    Cut(Tiles(m=256, n=64, k=32, group=2, parts=1, warps=4, stages=6), 1.26),
    Cut(Tiles(m=128, n=64, k=32, group=8, parts=1, warps=4, stages=6, resident=2), 1.43),
    Cut(Tiles(m=64, n=64, k=32, group=8, parts=1, warps=4, stages=6, resident=2), 2.3),
)
GRADIENTS = (
    Cut(Tiles(m=128, n=256, k=64, group=8, parts=2, warps=8, stages=4), 1.0),
    Cut(Tiles(m=128, n=128, k=64, group=8, parts=2, warps=8, stages=3), 0.97, abreast=2, reaching=1.2),
    Cut(Tiles(m=128, n=128, k=64, group=8, parts=2, warps=4, stages=3, resident=2), 1.06, reaching=1.35),
    Cut(Tiles(m=256, n=64, k=64, group=2, parts=1, warps=4, stages=4), 1.41),
    Cut(Tiles(m=128, n=64, k=64, group=8, parts=1, warps=4, stages=4, resident=2), 1.84),
    Cut(Tiles(m=64, n=64, k=64, group=8, parts=1, warps=4, stages=4, resident=2), 2.1),
    Cut(Tiles(m=64, n=64, k=32, group=8, parts=1, warps=4, stages=6, resident=2), 1.9, abreast=3),
    Cut(Tiles(m=128, n=64, k=64, group=8, parts=2, warps=4, stages=2, resident=2), 1.1, abreast=3, spans=True),
)


def sum_tiles(like: Tensor, tokens: int, parts: int, side_n: int, side_k: int, *, turned: bool = False) -> Tiles:
    """Of sums (tokens, parts, side_n) of products with blocks ``side_k`` long, which are stored ``turned`` or not."""
    return _sum_tiles(like.device, like.element_size(), tokens, parts, side_n, side_k, turned)


@lru_cache(maxsize=1024)  # every call asks for some
def _sum_tiles(
    device: torch.device, itemsize: int, tokens: int, parts: int, side_n: int, side_k: int, turned: bool
) -> Tiles:
    def time(cut: Cut, processors: int) -> float:
        tiles = cut.tiles
        count = -(-tokens // tiles.m) * parts * -(-side_n // tiles.n)
        cost = cut.cost * (cut.reaching if turned and side_n % tiles.n else 1.0)
        return -(-count // processors) * tiles.m * tiles.n * cost

    return _best(device, itemsize, sum_cuts(side_k, itemsize), time).tiles


def sum_cuts(side_k: int, itemsize: int = 2) -> Sequence[Cut]:
    """Those among which sums over inner sides of so many numbers choose, as they are for 2 bytes a number."""
    halves = side_k * itemsize // 2
    shorter = _padded(halves, _SHORT_STEP) < _padded(halves, _WHOLE_STEP)
    return SHORT_SUMS if shorter else SUMS


def gradient_cut(
    device: torch.device, tokens: int, blocks: Sequence[Sequence[tuple[int, int]]], made: Gradients
) -> Cut:
    """Of gradients summed over ``tokens``, where each part of a is in such blocks: see
    :func:`~structfly.lowering.block_products.gradient_places.columns_of_rows`."""

    def time(cut: Cut, processors: int) -> float:
        count = count_tiles(blocks, made, cut.cutting)
        programs, step = programs_on(device, cut.tiles), cut.tiles.for_itemsize(made.itemsize).k
        split = ranges(count, tokens, step, programs, made.itemsize) if count else 1
        area = cut.tiles.m * cut.tiles.n * cut.abreast
        cost = cut.cost * (cut.reaching if made.side_n % cut.tiles.n else 1.0)
        return rounds(split, count, tokens, processors, made.itemsize) * area * cost

    return _best(device, made.itemsize, [cut for cut in GRADIENTS if not cut.cutting.why_not(made)], time)


def _best(device: torch.device, itemsize: int, cuts: Sequence[Cut], time: Callable[[Cut, int], float]) -> Cut:
    """What takes the busiest of so many multiprocessors least, for operands of so many bytes a number."""
    capability = device_model(device).capability
    if capability == _HOPPER:
        processors = processors_of(device)
        best = min(cuts, key=lambda cut: time(cut, processors))
    else:
        best = Cut(INTERPRETED if capability is None else SAFE, 1.0)
    return best._replace(tiles=best.tiles.for_itemsize(itemsize))


def _padded(side: int, step: int) -> int:
    return -(-side // step) * step

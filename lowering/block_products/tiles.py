"""How products of blocks are cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from structfly.lowering.block_products.gradient_places import Cutting, Gradients, count_tiles
from structfly.lowering.block_products.listing import Listing
from structfly.lowering.block_products.ranges import ranges, rounds
from structfly.lowering.device_profile import device_model
from structfly.lowering.gemm import Tiles, processors_of, programs_on
from structfly.lowering.tuning.choice import INTERPRETED, SAFE

_HOPPER = (9, 0)
_WHOLE_STEP, _SHORT_STEP = 64, 32  # of an inner side


class Summing(NamedTuple):
    """How a launch of sums is cut.

    Attributes:
        tiles: of each sum.
        swapped: whether they are made as their transposes, b a^T, of numbers of 2 bytes.  Tensor cores read the columns
            of a product, up to 256, from shared memory once for each 64 of its rows: so tokens, which are many, are
            its columns where few columns of b are in a tile.
    """

    tiles: Tiles
    swapped: bool = False


class Cut(NamedTuple):
    """Tiles, and what they cost.

    Attributes:
        cost: how long a multiprocessor takes for an entry of them, against the first of its list.
        abreast: how many of them, side by side, a program makes of gradients, which share what they take of a.
        turned: how many times as long sums take where b is turned.
        reaching: the same where tiles reach beyond a side of b that its rows lie along.
        spans: whether tiles of gradients reach over parts of b, as :class:`Cutting` has it.
        swapped: whether sums are made as their transposes, as :class:`Summing` has it.
    """

    tiles: Tiles
    cost: float
    abreast: int = 1
    turned: float = 1.0
    reaching: float = 1.0
    spans: bool = False
    swapped: bool = False

    @property
    def cutting(self) -> Cutting:
        """Of gradients."""
        return Cutting(self.tiles, self.abreast, self.spans)

    @property
    def summing(self) -> Summing:
        """Of sums."""
        return Summing(self.tiles, self.swapped)


# Costs are about the means of benchmarks/results/block_products_h100.json, at 16384 tokens or more, over the products
# that leave none of a cut's tiles partly empty, each against the first cut there, or one that was measured against it
# elsewhere; those of tiles that reach beyond a side are of the products there that do.
SUMS = (
    Cut(Tiles(m=128, n=256, k=64, group=8, parts=2, warps=8, stages=4), 1.0),
    Cut(Tiles(m=256, n=128, k=64, group=4, parts=2, warps=8, stages=4), 1.02, turned=0.95, reaching=1.1, swapped=True),
    Cut(Tiles(m=128, n=128, k=64, group=8, parts=2, warps=4, stages=3, resident=2), 1.01, reaching=1.2),
    Cut(Tiles(m=256, n=64, k=64, group=2, parts=1, warps=4, stages=4), 1.13, swapped=True),
    Cut(Tiles(m=128, n=64, k=64, group=8, parts=1, warps=4, stages=4, resident=2), 1.69),
    Cut(Tiles(m=64, n=64, k=64, group=8, parts=1, warps=4, stages=4, resident=2), 1.84),
)
# Where steps of 64 leave more of an inner side's last one empty than steps of 32.
SHORT_SUMS = (
    Cut(Tiles(m=128, n=128, k=32, group=8, parts=2, warps=4, stages=5, resident=2), 1.0),
    Cut(Tiles(m=256, n=128, k=32, group=8, parts=2, warps=8, stages=6), 0.97, swapped=True),
    Cut(Tiles(m=128, n=256, k=32, group=8, parts=2, warps=8, stages=6), 0.93),
    Cut(Tiles(m=256, n=64, k=32, group=2, parts=1, warps=4, stages=6), 1.22, swapped=True),
    Cut(Tiles(m=128, n=64, k=32, group=8, parts=1, warps=4, stages=6, resident=2), 1.43),
    Cut(Tiles(m=64, n=64, k=32, group=8, parts=1, warps=4, stages=6, resident=2), 2.3),
)
GRADIENTS = (
    Cut(Tiles(m=128, n=256, k=64, group=8, parts=2, warps=8, stages=4), 1.0),
    Cut(Tiles(m=128, n=128, k=64, group=8, parts=2, warps=8, stages=3), 0.97, abreast=2, reaching=1.2),
    Cut(Tiles(m=128, n=128, k=64, group=8, parts=2, warps=4, stages=3, resident=2), 1.09, reaching=1.35),
    Cut(Tiles(m=256, n=64, k=64, group=2, parts=1, warps=4, stages=4), 1.41),
    Cut(Tiles(m=128, n=64, k=64, group=8, parts=1, warps=4, stages=4, resident=2), 1.84),
    Cut(Tiles(m=64, n=64, k=64, group=8, parts=1, warps=4, stages=4, resident=2), 2.1),
    Cut(Tiles(m=64, n=64, k=32, group=8, parts=1, warps=4, stages=6, resident=2), 1.9, abreast=3),
    Cut(Tiles(m=128, n=64, k=64, group=8, parts=2, warps=4, stages=2, resident=2), 1.1, abreast=3, spans=True),
)


def sum_cut(like: Tensor, tokens: int, members: Listing, side_n: int, side_k: int, *, turned: bool = False) -> Summing:
    """Of sums (tokens, parts, side_n) of products with such blocks, ``side_k`` long, which are stored ``turned`` or
    not."""
    parts, even = len(members.starts) - 1, members.each > 0
    return _sum_cut(like.device, like.element_size(), tokens, parts, side_n, side_k, turned, even)


@lru_cache(maxsize=1024)  # every call asks for some
def _sum_cut(
    device: torch.device, itemsize: int, tokens: int, parts: int, side_n: int, side_k: int, turned: bool, even: bool
) -> Summing:
    def time(cut: Cut, processors: int) -> float:
        tiles = cut.tiles
        count = -(-tokens // tiles.m) * parts * -(-side_n // tiles.n)
        cost = cut.cost * (cut.turned * (cut.reaching if side_n % tiles.n else 1.0) if turned else 1.0)
        # Of parts with unequal numbers of members tiles are shared out, so that no round is waited for: see turns.
        rounds = -(-count // processors) if even or count < processors else count / processors
        return rounds * tiles.m * tiles.n * cost

    best = _best(device, itemsize, sum_cuts(side_k, itemsize), time)
    return Summing(best.tiles, best.swapped and itemsize == 2)


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

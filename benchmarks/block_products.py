"""Products of blocks in every cut of tiles that structfly chooses among, on a GPU: what that choice rests on.

A mode is one product.  Those of a flat block butterfly W at so many tokens: sums over blocks, as W or its transpose has
them ("turned"), and the gradients of blocks, alone and with those of a product of low rank.  Those of generalised block
low rank: components, which lie with the tokens last, of features by tiles; features of components; and the gradients of
tiles.  The provider "torch.mm" is the dense product of the same features, and of low rank those two products.  Every
call runs behind other work, so that what the host takes to launch it is not counted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from benchmarks import recording
from benchmarks.busy import times_behind_work
from benchmarks.recording import Row
from structfly import measure
from structfly.lowering.block_products.gradient_places import Gradients, Places, gradient_places
from structfly.lowering.block_products.gradients import LowRankGradients, block_gradients
from structfly.lowering.block_products.listing import listed
from structfly.lowering.block_products.products import block_sums
from structfly.lowering.block_products.tiles import GRADIENTS, Cut, sum_cuts

KERNEL = "block_products"
# Tokens, features in and out, blocks along a side, butterfly factors, rank.
CASES = (
    (16384, 4096, 4096, 16, 3, 128),
    (16384, 4096, 4096, 64, 6, 128),
    (16384, 4096, 16384, 16, 3, 128),
    (16384, 4096, 16384, 64, 6, 128),
    (32768, 768, 3072, 8, 2, 64),
    (32768, 768, 768, 8, 2, 64),
    (16384, 1536, 6144, 8, 2, 128),
    (2048, 4096, 4096, 16, 3, 128),
    (64, 4096, 4096, 16, 3, 128),
)
# Tokens, features, groups of components, the share of all tiles that each group has: an interval.
TILES = ((16384, 4096, 8, 0.75), (16384, 16384, 13, 0.5))
TILE = 128  # features, and components, of a tile
_GOLDEN = 0.6180339887498949
_MOST_EMPTY = 2  # tiles more than so many times as long as the side they are of are left out


class Case(NamedTuple):
    """One product.

    Attributes:
        mode: as results have it.
        cuts: those that are timed.
        product: takes one of them.
        plain: by torch.mm.
    """

    mode: str
    cuts: Sequence[Cut]
    product: Callable[[Cut], object]
    plain: Callable[[], object]


def random(*shape: int) -> Tensor:
    """The same bfloat16 numbers every time."""
    generator = torch.Generator("cuda").manual_seed(0)
    return torch.randn(shape, generator=generator, device="cuda").to(torch.bfloat16)


def butterfly(tokens: int, inside: int, out: int, grid: int, factors: int, rank: int) -> Iterator[Case]:
    """The products of a flat block butterfly."""
    each, side_k, side_n = 1 + factors, inside // grid, out // grid
    rows = torch.arange(grid, dtype=torch.int32, device="cuda").repeat_interleave(each)
    kept = [row if f < 0 else row ^ (1 << f) for row in range(grid) for f in range(-1, factors)]
    columns = torch.tensor(kept, dtype=torch.int32, device="cuda")
    by_rows, by_columns = listed(rows, columns, grid), listed(columns, rows, grid)
    x, grad, values = random(tokens, grid, side_k), random(tokens, grid, side_n), random(grid * each, side_n, side_k)
    y, dx, made = torch.empty_like(grad), torch.empty_like(x), torch.empty_like(values)
    z, dz, weight = random(tokens, rank), random(tokens, rank), random(out, inside)
    beside = LowRankGradients(dz, z, grad.new_empty(out, rank), grad.new_empty(rank, inside))

    @cache
    def places(cut: Cut, rank: int) -> Places:
        shape = Gradients(grid, grid, side_n, side_k, rank)
        return gradient_places(rows, columns, shape, cut.cutting)

    shape = f"{tokens}x{inside}x{out} bfloat16, blocks {side_k}x{side_n}"
    yield Case(
        f"sums {shape}",
        _narrow(sum_cuts(side_k), side_n),
        lambda cut: block_sums(x, values, y, by_rows, cut=cut.summing),
        lambda: x.flatten(1) @ weight.t(),
    )
    yield Case(
        f"sums turned {shape}",
        _narrow(sum_cuts(side_n), side_k),
        lambda cut: block_sums(grad, values, dx, by_columns, turned=True, cut=cut.summing),
        lambda: grad.flatten(1) @ weight,
    )
    cuts = _narrow(GRADIENTS, side_k)
    yield Case(
        f"gradients {shape}",
        cuts,
        lambda cut: block_gradients(grad, x, made, places(cut, 0)),
        lambda: grad.flatten(1).t() @ x.flatten(1),
    )
    yield Case(
        f"gradients with low rank {shape}",
        cuts,
        lambda cut: block_gradients(grad, x, made, places(cut, rank), beside=beside),
        lambda: (grad.flatten(1).t() @ z, dz.t() @ x.flatten(1)),
    )


def components(tokens: int, features: int, groups: int, share: float) -> Iterator[Case]:
    """The products of tiles between features and groups of components."""
    places = features // TILE
    index = intervals(places, groups, share).to("cuda")
    by_group, by_place = listed(index[0], index[1], groups), listed(index[1], index[0], places)
    x, tiles, z = random(tokens, places, TILE), random(index.shape[1], TILE, TILE), random(groups, TILE, tokens)
    order = torch.randperm(groups * TILE, generator=torch.Generator().manual_seed(0)).to("cuda", torch.int32)
    y, made, weight = torch.empty_like(x), torch.empty_like(tiles), random(features, groups * TILE)

    @cache
    def gradients(cut: Cut) -> Places:
        return gradient_places(index[1], index[0], Gradients(places, groups, TILE, TILE), cut.cutting)

    shape = f"{tokens}x{features}x{groups * TILE} bfloat16, {index.shape[1]} tiles {TILE}x{TILE}"
    flat = z.flatten(0, 1)
    yield Case(
        f"components {shape}",
        _narrow(sum_cuts(TILE), TILE),
        lambda cut: block_sums(x, tiles, z.flatten(0, 1), by_group, turned=True, rows=order, cut=cut.summing),
        lambda: weight.t() @ x.flatten(1).t(),
    )
    yield Case(
        f"features {shape}",
        _narrow(sum_cuts(TILE), TILE),
        lambda cut: block_sums(z, tiles, y, by_place, a_turned=True, cut=cut.summing),
        lambda: flat.t() @ weight.t(),
    )
    yield Case(
        f"gradients {shape}",
        _narrow(GRADIENTS, TILE),
        lambda cut: block_gradients(x, z, made, gradients(cut), b_turned=True),
        lambda: flat @ x.flatten(1),
    )


def intervals(places: int, groups: int, share: float) -> Tensor:
    """(2, tiles) int32, the group and the place of each tile: a group's are neighbours on a circle, begun where the
    golden section puts them."""
    width = round(share * places)
    starts = [int(group * _GOLDEN % 1 * places) for group in range(groups)]
    kept = [[group, (start + i) % places] for group, start in enumerate(starts) for i in range(width)]
    return torch.tensor(sorted(kept), dtype=torch.int32).t().contiguous()


def cases() -> Iterator[Case]:
    """All that is measured."""
    for case in CASES:
        yield from butterfly(*case)
    for tiles in TILES:
        yield from components(*tiles)


def _narrow(cuts: Sequence[Cut], side: int) -> list[Cut]:
    return [cut for cut in cuts if cut.tiles.n < _MOST_EMPTY * side]


def name_of(cut: Cut) -> str:
    """Sides, how many abreast, warps, stages, and programs a multiprocessor."""
    tiles, several = cut.tiles, f", {cut.abreast} abreast" if cut.abreast > 1 else ""
    several += ", spanning" * cut.spans + ", swapped" * cut.swapped
    return (
        f"{tiles.m}x{tiles.n}x{tiles.k}{several}, {tiles.warps} warps, {tiles.stages} stages, {tiles.resident} resident"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--output", type=Path, help="write this path with .csv and .json added")
    given = sys.argv[1:] if arguments is None else arguments
    chosen = parser.parse_args(given)
    console, rows = Console(width=150), []
    for case in cases():
        calls: dict[str, Callable[[], object]] = {
            "torch.mm": case.plain,
            **{name_of(cut): partial(case.product, cut) for cut in case.cuts},
        }
        times = times_behind_work(calls, "cuda", repeats=chosen.repeats).device
        console.print(case.mode, *(f"{who}: {time.median * 1e3:.4f} ms" for who, time in times.items()), sep="\n  ")
        rows += [Row.of_timing(time, kernel=KERNEL, provider=who, mode=case.mode) for who, time in times.items()]
    if chosen.output:
        command = recording.command_line("benchmarks.block_products", given)
        recording.write(chosen.output, rows, environment=measure.environment("cuda"), command=command)
    return 0


if __name__ == "__main__":
    sys.exit(main())

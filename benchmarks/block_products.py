"""Products of blocks in every cut of tiles that structfly chooses among, on a GPU: what that choice rests on.

A mode is one product: sums over blocks, or the gradients of blocks, of a flat block butterfly at so many tokens, alone
and with the gradients of a product of low rank.  The provider "torch.mm" is the dense product of the same features, and
of low rank those two products.  Every call runs behind other work, so that what the host takes to launch it is not
counted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import recording
from benchmarks.busy import times_behind_work
from benchmarks.recording import Row
from structfly import measure
from structfly.lowering.block_products.gradient_places import Gradients, Places, gradient_places
from structfly.lowering.block_products.gradients import LowRankGradients, block_gradients
from structfly.lowering.block_products.listing import Listing
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
    (2048, 4096, 4096, 16, 3, 128),
    (64, 4096, 4096, 16, 3, 128),
)
_MOST_EMPTY = 2  # tiles more than so many times as long as the side they are of are left out


def products(
    tokens: int, inside: int, out: int, grid: int, factors: int, rank: int
) -> dict[str, Callable[[Cut], object]]:
    """The products of one case, by name, each a function of the cut."""
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(torch.bfloat16)

    each = 1 + factors
    kept = [row if f < 0 else row ^ (1 << f) for row in range(grid) for f in range(-1, factors)]
    columns = torch.tensor(kept, dtype=torch.int32, device="cuda")
    starts = each * torch.arange(grid + 1, dtype=torch.int32, device="cuda")
    members = Listing(columns, None, starts, each)
    rows = torch.arange(grid, dtype=torch.int32, device="cuda").repeat_interleave(each)
    x, grad = random(tokens, grid, inside // grid), random(tokens, grid, out // grid)
    values = random(grid * each, out // grid, inside // grid)
    y, made = torch.empty_like(grad), torch.empty_like(values)
    z, dz = random(tokens, rank), random(tokens, rank)
    beside = LowRankGradients(dz, z, grad.new_empty(out, rank), grad.new_empty(rank, inside))

    @cache
    def places(cut: Cut, rank: int) -> Places:
        shape = Gradients(grid, grid, out // grid, inside // grid, rank)
        return gradient_places(rows, columns, shape, cut.tiles, cut.abreast)

    return {
        "sums": lambda cut: block_sums(x, values, y, members, tiles=cut.tiles),
        "gradients": lambda cut: block_gradients(grad, x, made, places(cut, 0)),
        "gradients with low rank": lambda cut: block_gradients(grad, x, made, places(cut, rank), beside=beside),
    }


def dense(tokens: int, inside: int, out: int, rank: int) -> dict[str, Callable[[], object]]:
    """The dense products of the same features."""
    x, grad, thin = (torch.randn(tokens, side, device="cuda").to(torch.bfloat16) for side in (inside, out, rank))
    weight = torch.randn(out, inside, device="cuda").to(torch.bfloat16)
    return {
        "sums": lambda: x @ weight.t(),
        "gradients": lambda: grad.t() @ x,
        "gradients with low rank": lambda: (grad.t() @ thin, thin.t() @ x),
    }


def name_of(cut: Cut) -> str:
    """Sides, how many abreast, warps, stages, and programs a multiprocessor."""
    tiles, _, abreast = cut
    several = f", {abreast} abreast" if abreast > 1 else ""
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
    for case in CASES:
        tokens, inside, out, grid, _, rank = case
        plain = dense(tokens, inside, out, rank)
        for name, product in products(*case).items():
            side = (out if name == "sums" else inside) // grid
            cuts = [
                cut
                for cut in (sum_cuts(inside // grid) if name == "sums" else GRADIENTS)
                if cut.tiles.n < _MOST_EMPTY * side
            ]
            calls: dict[str, Callable[[], object]] = {
                "torch.mm": plain[name],
                **{name_of(cut): partial(product, cut) for cut in cuts},
            }
            mode = f"{name} {tokens}x{inside}x{out} bfloat16, blocks {inside // grid}x{out // grid}"
            times = times_behind_work(calls, "cuda", repeats=chosen.repeats).device
            console.print(mode, *(f"{who}: {time.median * 1e3:.4f} ms" for who, time in times.items()), sep="\n  ")
            rows += [Row.of_timing(time, kernel=KERNEL, provider=who, mode=mode) for who, time in times.items()]
    if chosen.output:
        command = recording.command_line("benchmarks.block_products", given)
        recording.write(chosen.output, rows, environment=measure.environment("cuda"), command=command)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Monarch's two products in one launch, which structfly does not make, against the two launches that it makes.

The kernel here is that design: a program takes a block of outputs of so many tokens, makes all the numbers between the
factors that it needs, and multiplies them without their leaving the multiprocessor.  So they must fit there, and for
each block of outputs all of x is read once more, where two launches write what is between the factors once and read it
once.  Every call runs behind other work.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import triton
import triton.language as tl
from rich.console import Console
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks import recording
from benchmarks.arguments import sizes
from benchmarks.block_products import name_of
from benchmarks.busy import times_behind_work
from benchmarks.recording import Row
from structfly import measure
from structfly.lowering.block_products.tiles import Cut
from structfly.lowering.gemm import Tiles
from structfly.lowering.kronecker import monarch
from structfly.lowering.layer_products import Applied

KERNEL = "monarch_single_pass"
TWO = "two launches"
SHAPES = (
    (32768, 768, 3072, 4),
    (32768, 768, 768, 4),
    (16384, 1024, 1024, 4),
    (16384, 1024, 4096, 4),
    (16384, 1024, 1024, 8),
    (64, 1024, 1024, 4),
)
_ROUNDING = 2.0**-7  # of y relative to the two launches' y, which round what is between the factors as often


CUTS = tuple(
    replace(tiles, resident=resident)
    for tiles in (
        Tiles(m=64, n=64, k=64, group=1, parts=1, warps=4, stages=2),
        Tiles(m=64, n=128, k=64, group=1, parts=1, warps=4, stages=2),
        Tiles(m=64, n=128, k=64, group=1, parts=1, warps=4, stages=3),
        Tiles(m=128, n=64, k=64, group=1, parts=1, warps=4, stages=2),
        Tiles(m=128, n=128, k=64, group=1, parts=1, warps=4, stages=2),
        Tiles(m=128, n=128, k=64, group=1, parts=1, warps=8, stages=2),
        Tiles(m=128, n=128, k=64, group=1, parts=1, warps=8, stages=3),
    )
    for resident in (1, 2, 3)
)


@triton.jit  # type: ignore[untyped-decorator]
def single_pass(  # type: ignore[no-untyped-def]
    x,
    first,
    second,
    y,
    tokens,
    inputs: tl.constexpr,
    outputs: tl.constexpr,
    blocks: tl.constexpr,
    rank: tl.constexpr,
    tile_m: tl.constexpr,
    tile_n: tl.constexpr,
    tile_k: tl.constexpr,
    programs: tl.constexpr,
):
    """y (blocks, tokens, outputs) of x (blocks, tokens, inputs), first (blocks of inputs, of outputs, rank, inputs) and
    second (blocks, outputs, blocks, rank)."""
    for number in tl.range(tl.program_id(0), tl.cdiv(tokens, tile_m) * blocks, programs):
        m0 = number // blocks * tile_m
        block = number % blocks
        between = ()
        for part in tl.static_range(blocks):
            sums = tl.zeros((tile_m, rank), tl.float32)
            for k0 in range(0, inputs, tile_k):
                x_tile = tl.reshape(x.load([part, m0, k0]), (tile_m, tile_k))
                first_tile = tl.reshape(first.load([part, block, 0, k0]), (rank, tile_k)).T
                sums = tl.dot(x_tile, first_tile, sums)
            between += (sums.to(tl.bfloat16),)  # type: ignore[assignment]
        for n0 in range(0, outputs, tile_n):
            made = tl.zeros((tile_m, tile_n), tl.float32)
            for part in tl.static_range(blocks):
                second_tile = tl.reshape(second.load([block, n0, part, 0]), (tile_n, rank)).T
                made = tl.dot(between[part], second_tile, made)
            y.store([block, m0, n0], tl.reshape(made.to(tl.bfloat16), (1, tile_m, tile_n)))


def in_one_launch(x: Tensor, first: Tensor, second: Tensor, y: Tensor, cut: Tiles) -> Callable[[], object]:
    """A launch that writes y (tokens, blocks, outputs) of x (tokens, blocks, inputs)."""
    blocks, _, rank, inputs = first.shape
    side = max(16, triton.next_power_of_2(rank))
    programs = cut.resident * torch.cuda.get_device_properties(x.device).multi_processor_count
    boxes = (
        TensorDescriptor.from_tensor(x.transpose(0, 1), [1, cut.m, cut.k]),
        TensorDescriptor.from_tensor(first, [1, 1, side, cut.k]),
        TensorDescriptor.from_tensor(second, [1, cut.n, 1, side]),
        TensorDescriptor.from_tensor(y.transpose(0, 1), [1, cut.m, cut.n]),
    )
    constants = (inputs, second.shape[1], blocks, side, cut.m, cut.n, cut.k, programs)
    return partial(single_pass[(programs,)], *boxes, len(x), *constants, num_warps=cut.warps, num_stages=cut.stages)


def in_two(x: Tensor, first: Tensor, second: Tensor) -> Callable[[], Tensor]:
    """y (tokens, out), as structfly makes it."""
    blocks, _, rank, inputs = first.shape
    outputs = second.shape[1]
    factors = [
        first.transpose(1, 2).reshape(1, blocks, rank * blocks, 1, inputs, 1),
        second.reshape(blocks, 1, 1, outputs, blocks * rank, 1),
    ]
    call = Applied(x.flatten(1), factors, [blocks * outputs])
    return lambda: monarch.finish(call, monarch.between(call))


def calls_of(shape: Sequence[int], say: Callable[[str], object]) -> Iterator[tuple[str, Callable[[], object]]]:
    """The two launches, and every cut that can be had and gives their y."""
    tokens, in_features, out_features, blocks = shape
    generator = torch.Generator("cuda").manual_seed(0)
    inputs, outputs, rank = in_features // blocks, out_features // blocks, min(in_features, out_features) // blocks**2

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(torch.bfloat16)

    x, first = normal(tokens, blocks, inputs), normal(blocks, blocks, rank, inputs) / inputs**0.5
    second = normal(blocks, outputs, blocks, rank) / (blocks * rank) ** 0.5
    two = in_two(x, first, second)
    yield TWO, two
    wanted = two().view(tokens, blocks, outputs).float()
    for cut in CUTS:
        y = torch.full((tokens, blocks, outputs), float("nan"), device="cuda", dtype=torch.bfloat16)
        one, name = in_one_launch(x, first, second, y, cut), name_of(Cut(cut, 1.0))
        try:
            one()
        except triton.runtime.errors.OutOfResources as problem:
            say(f"{name} is left out: {problem}")
            continue
        error = ((y.float() - wanted).norm() / wanted.norm()).item()
        if not error <= _ROUNDING:
            raise RuntimeError(
                f"{name}: y is off by {error:.2g} of its norm, where rounding is at most {_ROUNDING:.2g}"
            )
        yield name, one


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="+", type=sizes("tokens x in x out x blocks"), metavar="TOKENSxINxOUTxBLOCKS", default=SHAPES
    )
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--output", type=Path, help="write this path with .csv and .json added")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    chosen = parse_arguments(given)
    console = Console(width=None if sys.stdout.isatty() else 120)
    rows: list[Row] = []
    for shape in chosen.shapes:
        *of_layer, blocks = shape
        mode = f"{'x'.join(map(str, of_layer))} bfloat16, {blocks} blocks, forward"
        calls = dict(calls_of(shape, console.print))
        times = times_behind_work(calls, "cuda", repeats=chosen.repeats).device
        console.print(mode, highlight=False)
        for name, timing in sorted(times.items(), key=lambda item: item[1].median):
            console.print(f"{1e6 * timing.median:9.1f} us  {name}", highlight=False)
            rows.append(Row.of_timing(timing, kernel=KERNEL, provider=name, mode=mode))
    if chosen.output:
        command = recording.command_line("benchmarks.monarch_single_pass", given)
        recording.write(chosen.output, rows, environment=measure.environment("cuda"), command=command)
    return 0


if __name__ == "__main__":
    sys.exit(main())

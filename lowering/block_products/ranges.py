"""Sums over the tokens that are cut in ranges, so that no processor waits while few others still have a tile."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from structfly.lowering.gemm import kernel_of
from structfly.lowering.launch import Launch, on_device
from structfly.lowering.template import Parameter

# Additions and multiplications of 16-bit numbers that a device does while it moves a byte of ranges: 600 TFLOP/s, and
# 1.2 TB/s, what products with ranges in benchmarks/results/block_products_h100.json come to.  That is less than half of
# what a copy moves: nothing is multiplied while a tile in float32 is written, nor while ranges are added.
_BALANCE = 500
_MOST_ROUNDS = 4  # of ranges, where whole sums have none: it bounds what they hold
_BLOCK = 1024


@lru_cache(maxsize=1024)
def ranges(tiles: int, tokens: int, step: int, programs: int, itemsize: int = 2, fit: int | None = None) -> int:
    """In how many ranges ``tokens`` are cut, of ``step`` or more, so that the sums of ``tiles`` take least time;
    in no more than ``fit`` in memory, if that is given, but one."""
    most = min(-(-tokens // step), _MOST_ROUNDS * programs // tiles)
    most = most if fit is None else min(most, fit)
    return min(range(1, max(most, 1) + 1), key=lambda split: rounds(split, tiles, tokens, programs, itemsize))


def rounds(split: int, tiles: int, tokens: int, programs: int, itemsize: int = 2) -> float:
    """The time that ``tiles`` take in so many ranges, against a round of whole sums.

    A round takes 2 * area * tokens / rate for each program.  A range is written and read once more in float32: 8 bytes
    an entry, which take 8 * area * tiles / bandwidth, so 4 * balance / tokens of a round for as many tiles as programs.
    Numbers of twice the bytes, in TF32, are multiplied at half the rate.
    """
    balance = 2 * _BALANCE / itemsize
    of_ranges = 4 * balance / tokens * tiles / programs * split if split > 1 else 0.0
    return -(-tiles * split // programs) / split + of_ranges


def add_ranges(sums: Tensor, results: Sequence[Tensor]) -> None:
    """Add ranges in order, in float32.

    Args:
        sums: (ranges, entries) float32, those of each result one after another.
        results: contiguous, of one dtype, written.
    """
    made = [each for each in results if each.numel()]
    arguments: list[Tensor | int] = []
    first = 0
    for each in made:
        arguments += [each, first, each.numel()]
        first += each.numel()
    if not made:
        return
    parameters: dict[str, Parameter] = {
        "results": len(made),
        "interpreted": not sums.is_cuda,
        "bfloat16": made[0].dtype == torch.bfloat16,
    }
    kernel = kernel_of("range_sums", tuple(parameters.items()))
    launch = Launch(kernel, (-(-first // _BLOCK),), {"BLOCK": _BLOCK}, num_warps=4)
    with on_device(sums.device):
        launch(sums, *arguments, *sums.shape)

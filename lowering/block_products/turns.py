"""Which program makes which tiles, where some take longer than others."""

from __future__ import annotations

from functools import lru_cache
from heapq import heapreplace

import torch
from torch import Tensor

from structfly.lowering.block_products.listing import member_counts

_EPILOGUE = 4  # steps that storing a tile takes as long as
_EVEN_OUT = 2  # rounds, of a tile for each program, that are taken in another order


def turns(starts: Tensor, tall: int, across: int, steps: int, more: int, group: int, programs: int) -> Tensor:
    """The tiles of sums by program, so that all programs end at about one time.

    Each tile in turn goes to the program that has least to do as yet, the last ones in the order of their work: list
    scheduling, the end of it longest first (Graham 1969).  All others are taken in the order of their numbers, so that
    programs that run at one time share operands, as they do where all tiles are equal.

    Args:
        starts: int32 (parts + 1,), where the members of each part begin; the host reads them.
        tall, across: tiles along the tokens, and along a part.
        steps, more: along K for each member of a part, and for every part besides.
        group: of tiles along the tokens, as the skeleton numbers them.
        programs: how many there are.

    Returns:
        int32 (programs + 1 + tiles,) on the device of ``starts``: where the numbers of each program's tiles begin, and
        end, and the numbers.
    """
    return _shared_out(tuple(member_counts(starts)), tall, across, steps, more, group, programs).to(starts.device)


@lru_cache(maxsize=64)  # for tensors about which nothing is remembered
def _shared_out(
    counts: tuple[int, ...], tall: int, across: int, steps: int, more: int, group: int, programs: int
) -> Tensor:
    """The same on the host, of parts with so many members."""
    numbers = torch.arange(tall * len(counts) * across)
    in_group = group * len(counts) * across
    height = (tall - numbers // in_group * group).clamp(max=group)
    part = numbers % in_group // height // across
    work = torch.tensor(counts)[part] * steps + more + _EPILOGUE
    first_of_last = max(0, len(numbers) - _EVEN_OUT * programs)
    last = work[first_of_last:].argsort(descending=True, stable=True) + first_of_last
    order = torch.cat([numbers[:first_of_last], last]).tolist()
    busy = [(0, program) for program in range(programs)]  # until when, a heap
    taken: list[list[int]] = [[] for _ in range(programs)]
    for number, takes in zip(order, work[order].tolist(), strict=True):
        until, program = busy[0]
        taken[program].append(number)
        heapreplace(busy, (until + takes, program))
    begins = torch.tensor([0, *map(len, taken)]).cumsum(0) + (programs + 1)
    listed = torch.tensor([number for each in taken for number in each])
    return torch.cat([begins, listed]).to(torch.int32)

"""Blocks of time for the lowering in ATen: where a block's steps lie in its rows, and sequences that are packed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from structfly.lowering.linear_recurrence.arguments import STEPS_KEPT, Arguments

STEPS = STEPS_KEPT["aten"]
_ELEMENTS = 2**19  # of a block, of which a backward holds up to ten: 20 MiB in float32
_SHORT = 32  # steps that are as well gone through one by one


@dataclass(frozen=True)
class Block:
    """Some steps of some sequences and channels, in rows.

    Row k has the k-th step of every chunk of L: rows are (L, sequences, chunks, channels).  Where the last chunk is not
    full, what is read fills it up.
    """

    number: int
    sequences: slice
    channels: slice
    steps: slice

    @cached_property
    def count(self) -> int:
        """Of its steps."""
        return int(self.steps.stop - self.steps.start)

    @cached_property
    def chunk(self) -> int:
        """L."""
        return self.count if self.count <= _SHORT else math.isqrt(self.count - 1) + 1

    @cached_property
    def chunks(self) -> int:
        return -(-self.count // self.chunk)

    def read(self, source: Tensor, fill: float, dtype: torch.dtype) -> Tensor:
        """The rows of ``source`` (B, T, D)."""
        part = source[self.sequences, self.steps, self.channels]
        rows = part.new_empty(self.chunk, part.shape[0], self.chunks, part.shape[2], dtype=dtype)
        if rest := self.count % self.chunk:
            rows[rest:, :, -1] = fill
        for inside, outside in self._pairs(rows, part):
            inside.copy_(outside)
        return rows

    def read_mask(self, mask: Tensor) -> Tensor:
        """The rows of ``mask`` (B, T), (L, sequences, chunks, 1)."""
        return Block(self.number, self.sequences, slice(None), self.steps).read(mask.unsqueeze(2), False, torch.bool)

    def write(self, rows: Tensor, out: Tensor) -> None:
        """Put rows where they belong in ``out`` (B, T, D)."""
        for inside, outside in self._pairs(rows, out[self.sequences, self.steps, self.channels]):
            outside.copy_(inside)

    def at(self, steps: Tensor) -> tuple[Tensor, int, Tensor]:
        """The index of such steps of packed sequences, counted from the block's first, in its rows: (M, channels)."""
        return steps % self.chunk, 0, steps // self.chunk

    def _pairs(self, rows: Tensor, outside: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of the full chunks and of the rest, both in the order of time."""
        full, rest = divmod(self.count, self.chunk)
        last = full * self.chunk
        yield rows[:, :, :full].permute(1, 2, 0, 3), outside[:, :last].unflatten(1, (full, self.chunk))
        if rest:
            yield rows[:rest, :, full].transpose(0, 1), outside[:, last:]


def parts(shape: tuple[int, int, int]) -> Iterator[tuple[slice, slice]]:
    """Sequences and channels of (B, T, D) that are worked on together: as many as keep a block small."""
    batch, length, width = shape
    if not (batch and length and width):
        return
    steps = min(length, STEPS)
    channels = min(width, max(1, _ELEMENTS // steps))
    together = max(1, _ELEMENTS // (steps * channels))
    for first in range(0, batch, together):
        for channel in range(0, width, channels):
            yield slice(first, min(first + together, batch)), slice(channel, min(channel + channels, width))


def blocks_of(part: tuple[slice, slice], length: int, *, reverse: bool) -> Iterator[Block]:
    """The blocks of a part, in the order of time or against it."""
    numbers = range(-(-length // STEPS))
    for number in reversed(numbers) if reverse else numbers:
        yield Block(number, *part, slice(number * STEPS, min((number + 1) * STEPS, length)))


@dataclass(frozen=True)
class Packed:
    """Sequences that lie one after another in time: the state before a sequence's first step is its own.

    Attributes:
        number: which sequences have steps at all, (M,).
        first, last: their first and last step in the order of the recurrence.
        begins: (1, T) bool.
    """

    number: Tensor
    first: Tensor
    last: Tensor
    begins: Tensor

    @classmethod
    def of(cls, call: Arguments) -> Packed | None:
        if call.offsets is None:
            return None
        offsets = call.offsets.to(torch.int64)
        (number,) = torch.nonzero(offsets.diff() > 0, as_tuple=True)
        first, last = offsets[number], offsets[number + 1] - 1
        first, last = (last, first) if call.reverse else (first, last)
        begins = torch.zeros(1, call.input.shape[1], dtype=torch.bool, device=offsets.device)
        begins[0, first] = True
        return cls(number, first, last, begins)

    def inside(self, steps: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        """Of ``first`` or ``last``: which sequences have it in the block, and how far from the block's first step."""
        (chosen,) = torch.nonzero((steps >= block.steps.start) & (steps < block.steps.stop), as_tuple=True)
        return self.number[chosen], steps[chosen] - block.steps.start

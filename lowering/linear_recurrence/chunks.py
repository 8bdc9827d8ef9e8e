"""How time is cut into chunks for the generated kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chunks:
    """Chunks of ``steps`` steps; the last one of a sequence may have fewer.

    Attributes:
        steps: of a chunk.
        batch, length: the sizes of what is cut.
        offsets: (N + 1,) int64, of packed sequences, or None where each of ``batch`` sequences has ``length`` steps.
    """

    steps: int
    batch: int
    length: int
    offsets: Tensor | None

    @property
    def per_sequence(self) -> int:
        """Chunks of a sequence that is not packed."""
        return -(-self.length // self.steps)

    @property
    def count(self) -> int:
        """Of all chunks; where sequences are packed no fewer than there are, and those too many are empty."""
        if self.offsets is None:
            return self.batch * self.per_sequence
        return self.length // self.steps + len(self.offsets) - 1

    def table(self) -> Tensor:
        """Of packed sequences: each chunk's sequence, first step, end, and how many chunks of its sequence come before
        and after it, (5, count) int64; a chunk that is too many has no steps."""
        assert self.offsets is not None
        counts = (self.offsets.diff() + (self.steps - 1)) // self.steps
        bounds = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        last = len(self.offsets) - 2
        number = torch.arange(self.count, device=bounds.device)
        sequence = torch.searchsorted(bounds[1:], number, right=True)
        exists = sequence <= last
        sequence = sequence.clamp_max(last)
        position = number - bounds[sequence]
        start = self.offsets[sequence] + position * self.steps
        stop = torch.minimum(start + self.steps, self.offsets[sequence + 1])
        left = bounds[sequence + 1] - 1 - number
        return torch.where(exists, torch.stack([sequence, start, stop, position, left]), 0)

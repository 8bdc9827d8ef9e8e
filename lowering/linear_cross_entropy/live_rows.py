"""The rows of a head that count, found on the device without telling the host."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from structfly.lowering.linear_cross_entropy.chunked import Head
from structfly.lowering.template import load, render

_BLOCK = 4096


class LiveRows:
    """Rows that are neither ignored nor of coefficient 0, one after another.

    Args:
        coefficient: (N,) float32, or None for ones.
        length: rows of a chunk.

    Attributes:
        count: () int32, how many they are.
        index: (N,) int32, where each of them stands among all rows; 0 past the last.
        wrong: () int32, 1 if a target that is not ignored is no class, else 0; such rows do not count.
    """

    def __init__(self, head: Head, coefficient: Tensor | None, length: int) -> None:
        rows, classes = len(head.target), head.num_classes
        device, chunks = head.target.device, -(-rows // length)
        kind = torch.int32 if chunks * classes < 2**31 else torch.int64
        self.count, self.wrong = torch.zeros(2, dtype=torch.int32, device=device).unbind()
        self.index = torch.empty(rows, dtype=torch.int32, device=device)
        self._keys = torch.empty(rows, dtype=kind, device=device)
        _module(head.ignore_index, coefficient is not None).live_rows[(1,)](
            *(head.target, self.count if coefficient is None else coefficient.contiguous()),
            *(rows, length, self.index, self._keys, self.count, self.wrong),
            LARGEST=torch.iinfo(kind).max,
            CLASSES=classes,
            BLOCK=_BLOCK,
            num_warps=16,
        )

    def by_target(self) -> tuple[Tensor, Tensor]:
        """The rows of every chunk sorted by target, equal targets in order.

        Returns:
            (N,) keys, chunk * num_classes + target, ascending, and (N,) int64, where each row stands among those that
            count; what is past the last row comes last.
        """
        return torch.sort(self._keys, stable=True)


@lru_cache(maxsize=64)
def _module(ignore_index: int | None, coefficient: bool) -> Any:
    return load(render("linear_cross_entropy_live_rows", ignore_index=ignore_index, coefficient=coefficient))

"""The rows of a head that count, found on the device without telling the host."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from structfly.lowering.launch import Launch
from structfly.lowering.linear_cross_entropy.chunked import Head
from structfly.lowering.template import load, render

_BLOCK = 4096


class LiveRows:
    """Rows that are neither ignored nor of coefficient 0, one after another.

    Args:
        chosen: (N,) numbers that are 0 for rows that do not count, or None.
        length: rows of a chunk.
        apart: whether :meth:`by_target` sorts every chunk by itself.

    Attributes:
        count: () int32, how many they are.
        index: (N,) int32, where each of them stands among all rows; 0 past the last.
        wrong: () int32, 1 if a target that is not ignored is no class, else 0; such rows do not count.
        zeros: (chunks,) int32, 0 for each chunk.
    """

    def __init__(self, head: Head, chosen: Tensor | None, length: int, *, apart: bool = True) -> None:
        rows, classes = len(head.target), head.num_classes
        device, chunks = head.target.device, -(-rows // length)
        kind = torch.int32 if (chunks if apart else 1) * classes < 2**31 else torch.int64
        numbers = torch.empty(rows + 2 + chunks, dtype=torch.int32, device=device)
        self.index, self.zeros, both = numbers.split_with_sizes((rows, chunks, 2))
        self.count, self.wrong = both.unbind()
        self._keys = torch.empty(rows, dtype=kind, device=device)
        Launch(
            _module(head.ignore_index, chosen is not None).live_rows,
            (1,),
            {"LARGEST": torch.iinfo(kind).max, "CLASSES": classes, "BLOCK": _BLOCK},
            [
                *(head.target, self.count if chosen is None else chosen.contiguous()),
                *(rows, length if apart else rows),
                *(self.index, self._keys, self.count, self.wrong, self.zeros, chunks),
            ],
            num_warps=16,
        )()

    def by_target(self) -> tuple[Tensor, Tensor]:
        """The rows sorted by target, every chunk by itself where asked, equal targets in order.

        Returns:
            (N,) keys, chunk * num_classes + target, or the target alone, ascending, and (N,) int64, where each row
            stands among those that count; what is past the last row comes last.
        """
        return torch.sort(self._keys, stable=True)


@lru_cache(maxsize=64)
def _module(ignore_index: int | None, chosen: bool) -> Any:
    return load(render("linear_cross_entropy_live_rows", ignore_index=ignore_index, chosen=chosen))

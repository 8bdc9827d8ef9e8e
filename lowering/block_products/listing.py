"""Which blocks and which parts of a source the parts of a result are the sums of."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Listing(NamedTuple):
    """Parts of a result, each the sum of as many products as it has members.

    Attributes:
        sources: int32 (members,), the part of the source that each member takes, those of part 0 first.
        blocks: int32 (members,), the block of each member; None for the first, the second, and so on.
        starts: int32 (parts + 1,), where the members of each part begin.
        each: how many members every part has, or 0 where they differ.
    """

    sources: Tensor
    blocks: Tensor | None
    starts: Tensor
    each: int


def listed(parts: Tensor, sources: Tensor, count: int) -> Listing:
    """Block k takes part ``sources[k]`` of the source and adds to part ``parts[k]`` of the result, of ``count``.

    The tensors of the listing are its own.  The host reads how many members each part has, and whether they are in
    order.
    """
    ordered, order = parts.sort(stable=True)
    edges = torch.arange(count + 1, dtype=parts.dtype, device=parts.device)
    starts = torch.searchsorted(ordered, edges).to(torch.int32)
    in_order = bool((ordered == parts).all())
    return Listing(sources[order].to(torch.int32), None if in_order else order.to(torch.int32), starts, in_each(starts))


def in_each(starts: Tensor) -> int:
    """How many members every part has, or 0 where they differ; read on the host."""
    counts = set(member_counts(starts))
    return counts.pop() if len(counts) == 1 else 0


def member_counts(starts: Tensor) -> list[int]:
    """How many members each part has; read on the host."""
    counts: list[int] = starts.diff().tolist()
    return counts

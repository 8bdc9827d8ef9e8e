"""How opaque ops behave under vmap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def one_by_one(op: Any) -> Any:
    """A vmap rule that runs the op once per batch entry: one entry already fills the device."""

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        results = []
        for index in range(info.batch_size):
            entry = [
                value if dim is None or not isinstance(value, Tensor) else value.select(dim, index)
                for value, dim in zip(arguments, in_dims, strict=True)
            ]
            results.append(op(*entry))
        stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    return rule

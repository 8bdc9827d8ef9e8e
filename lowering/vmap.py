"""How opaque ops behave under vmap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def one_by_one(op: Any) -> Any:
    """A vmap rule that runs the op once per batch entry: one entry already fills the device."""

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        results = []
        for index in range(info.batch_size):
            entry = [_entry(value, dim, index) for value, dim in zip(arguments, in_dims, strict=True)]
            results.append(op(*entry))
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = tuple(_stacked(parts) for parts in zip(*results, strict=True))
        return stacked, tuple([0] * len(part) if isinstance(part, list) else 0 for part in stacked)

    return rule


def _entry(value: Any, dim: Any, index: int) -> Any:
    """One batch entry of an argument: of a tensor, of each of several tensors, or of what has no batch."""
    if isinstance(value, Tensor):
        return value if dim is None else value.select(dim, index)
    if isinstance(value, (list, tuple)) and isinstance(dim, (list, tuple)):
        return [_entry(each, each_dim, index) for each, each_dim in zip(value, dim, strict=True)]
    return value


def _stacked(parts: tuple[Any, ...]) -> Any:
    if isinstance(parts[0], Tensor):
        return torch.stack(parts)
    return [torch.stack(each) for each in zip(*parts, strict=True)]

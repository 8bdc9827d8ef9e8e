"""Several tensors in one allocation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_ALIGNMENT = 128  # bytes: what tensor descriptors ask of a base is 16


def in_one_buffer(device: torch.device, *parts: tuple[tuple[int, ...], torch.dtype]) -> list[Tensor]:
    """Uninitialised tensors of these shapes and dtypes, side by side.

    PyTorch's allocator on GPUs may give a large tensor up to 1 MiB more than it asks for; these ask once.
    """
    firsts, end = [], 0
    for shape, dtype in parts:
        firsts.append(end // dtype.itemsize)
        end += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    buffer = torch.empty(end, dtype=torch.uint8, device=device)
    seen_as = {dtype: buffer.view(dtype) for _, dtype in parts}
    return [
        seen_as[dtype].as_strided(shape, [math.prod(shape[side + 1 :]) for side in range(len(shape))], first)
        for first, (shape, dtype) in zip(firsts, parts, strict=True)
    ]

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
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in parts]
    rounded = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
    pieces = torch.empty(sum(rounded), dtype=torch.uint8, device=device).split(rounded)
    return [
        piece[:size].view(dtype).view(shape) for piece, size, (shape, dtype) in zip(pieces, sizes, parts, strict=True)
    ]

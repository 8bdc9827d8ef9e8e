"""What the generated kernels over rows of logits have in common."""

from __future__ import annotations

import torch

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def launch_sizes(classes: int) -> tuple[int, int]:
    """Classes at a time, and warps: eight classes, 16 bytes of bfloat16, a thread.

    Wider blocks leave fewer rows on a multiprocessor, which costs more on 50257 classes than it gains on 131072.
    """
    block = min(4096, max(16, 1 << (classes - 1).bit_length()))
    return block, max(1, block // 256)

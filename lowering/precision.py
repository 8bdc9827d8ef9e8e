"""The setting of torch that lets products of float32 on CUDA devices round their operands to TF32."""

from __future__ import annotations

import torch

from structfly.compat import constant_in_graphs


@constant_in_graphs
def tf32_allowed() -> bool:
    """Whether it is on, however that was done.

    In a compiled graph the answer is that of when it was traced: torch's guards and caches know the setting.
    """
    # allow_tf32 cannot be read where the setting was made by fp32_precision.
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")

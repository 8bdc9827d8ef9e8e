"""The specification of a head's logits: plain, differentiable PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from structfly.lowering.head.epilogue import parse_epilogue


def logits_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    classes: int,
    *,
    adapter_x: Tensor | None = None,
    adapter_weight: Tensor | None = None,
    adapter_scale: float = 1.0,
    epilogue: str = "",
    operands: Sequence[Tensor] = (),
) -> Tensor:
    """(N, classes) ``epilogue(x weight^T + adapter_scale adapter_x adapter_weight^T + bias)`` of the first classes."""
    logits = F.linear(x, weight[:classes], None if bias is None else bias[:classes])
    if adapter_x is not None and adapter_weight is not None:
        logits = logits + adapter_scale * F.linear(adapter_x, adapter_weight[:classes])
    return parse_epilogue(epilogue).apply(logits, operands)

"""Other implementations of the loss head, each from its own package, which must be installed.

Every peer takes the plain loss as models write it and gives back its own, of the same signature.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[..., Tensor]


def _inductor_chunker(loss: Loss) -> Loss:
    """Inductor's own chunking of large products, which is off by default."""
    compiled = torch.compile(loss, fullgraph=True, dynamic=False, options={"auto_chunker.enable": True})
    return compiled


def _torch(_: Loss) -> Loss:
    """``torch.nn.functional.linear_cross_entropy`` with its chunked algorithm, in torch 2.13 and newer."""
    options = torch.nn.LinearCrossEntropyOptions()
    function: Any = F.linear_cross_entropy
    return lambda x, w, t: function(x, w, t, options=options)


def _liger(accumulation: torch.dtype | None, memory_factor: int | None = None) -> Callable[[Loss], Loss]:
    """Liger Kernel; ``accumulation`` is the dtype of the weight gradient's sum, None for its own."""

    def build(_: Loss) -> Loss:
        module: Any = import_module("liger_kernel.ops.fused_linear_cross_entropy")
        apply = module.LigerFusedLinearCrossEntropyFunction.apply
        more = () if memory_factor is None else (False, False, False, None, None, memory_factor)

        def loss(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
            result: Tensor = apply(x, w, t, None, None, -100, 0.0, 0.0, "mean", None, False, accumulation, *more)[0]
            return result

        return loss

    return build


def _cut_cross_entropy(filter_eps: str | None) -> Callable[[Loss], Loss]:
    """Apple's Cut Cross-Entropy, with gradient filtering or without."""

    def build(_: Loss) -> Loss:
        function: Any = import_module("cut_cross_entropy").linear_cross_entropy
        return lambda x, w, t: function(x, w, t, filter_eps=filter_eps)

    return build


PEERS: Mapping[str, Callable[[Loss], Loss]] = {
    "inductor-chunker": _inductor_chunker,
    "torch": _torch,
    "liger": _liger(None),
    "liger-float32": _liger(torch.float32),
    "liger-float32-memory8": _liger(torch.float32, 8),
    "cce": _cut_cross_entropy("auto"),
    "cce-exact": _cut_cross_entropy(None),
}

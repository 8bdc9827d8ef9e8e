"""What a structure's cost is held to: what its layer keeps, takes and multiplies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from structfly.lowering.layer_flops import LAYER_OPS
from structfly.patterns.structure import Structure, StructuredLinear
from structfly.records.layer import LayerSizes
from tests.memory import MostAtOnce

_OPS = {getattr(torch.ops.structfly, op.name).default: op for op in LAYER_OPS}


def check_cost(structure: Structure, sizes: LayerSizes, dtype: torch.dtype, tokens: int) -> float:
    """``saved_bytes`` and ``flops`` are what is kept and counted; ``transient_bytes`` is never less than is taken.

    Returns:
        How many times as much ``transient_bytes`` is, 1 where nothing is taken.
    """
    layer = StructuredLinear(structure, *sizes, bias=False, dtype=dtype)
    cost = structure.cost(sizes, dtype).at(tokens)
    x = torch.randn(tokens, sizes.in_features).to(dtype).requires_grad_()
    assert cost["saved_bytes"] == _saved_bytes(layer, x)
    # torch's counter knows products of matrices, and not that of one with a vector, which a gate is.
    gate = 2 * tokens * sizes.in_features if getattr(structure, "gated", False) else 0
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
    assert cost["flops"] == counter.get_total_flops() + gate
    with torch.no_grad(), _MostAtOnce() as seen:
        layer(x)
    taken = seen.bytes - y.numel() * y.element_size()
    assert cost["transient_bytes"] >= taken
    return cost["transient_bytes"] / taken if taken else 1.0


def _saved_bytes(layer: StructuredLinear, x: Tensor) -> int:
    """Of all tensors that autograd keeps, besides the input and what the layer holds."""
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)
    for held in (x, *layer.parameters(), *layer.buffers()):
        saved.pop(held.untyped_storage().data_ptr(), None)
    assert y.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


class _MostAtOnce(MostAtOnce):
    """Of those made within the layers' ops, too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _OPS:
            with self:
                return _OPS[func]._forward(*args)
        return super().__torch_dispatch__(func, types, args, kwargs)

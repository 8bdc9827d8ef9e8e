"""What a structure's cost is held to: what its layer keeps, takes and multiplies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from structfly.lowering.layer_flops import LAYER_OPS
from structfly.patterns.structure import Structure, StructuredLinear
from structfly.records.layer import LayerSizes

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


class _MostAtOnce(TorchDispatchMode):
    """The most bytes of new tensors that were alive at a time, those within the layers' ops among them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive: list[tuple[StorageWeakRef, int]] = []
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _OPS:
            with self:
                return _OPS[func]._forward(*args)
        result = func(*args, **(kwargs or {}))
        self.alive = [(storage, size) for storage, size in self.alive if not storage.expired()]
        known = {storage.cdata for storage, _ in self.alive}
        known |= {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and made.untyped_storage()._cdata not in known:
                self.alive.append((StorageWeakRef(made.untyped_storage()), made.untyped_storage().nbytes()))
        self.bytes = max(self.bytes, sum(size for _, size in self.alive))
        return result

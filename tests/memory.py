"""How many bytes of tensors are alive at a time, on any device."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MostAtOnce(TorchDispatchMode):
    """The most bytes of new tensors that were alive at a time in this context, those without numbers left out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive: list[tuple[StorageWeakRef, int]] = []
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.alive = [(storage, size) for storage, size in self.alive if not storage.expired()]
        known = {storage.cdata for storage, _ in self.alive}
        known |= {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for made in tree_leaves(result):
            if not isinstance(made, Tensor) or made.is_meta:
                continue
            if made.untyped_storage()._cdata not in known:
                self.alive.append((StorageWeakRef(made.untyped_storage()), made.untyped_storage().nbytes()))
        self.bytes = max(self.bytes, sum(size for _, size in self.alive))
        return result

"""What a tensor is, beside its numbers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def storage_key(tensor: Tensor) -> int:
    """The same number for tensors that share memory; for a sparse tensor, which has no storage, its own.  Inside a vmap
    a tensor has that of the one that was given to it."""
    while torch._C._functorch.is_batchedtensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return int(tensor.untyped_storage()._cdata) if tensor.layout == torch.strided else id(tensor)


def version(tensor: Tensor) -> int:
    """How often the tensor, or a view of the same memory, was written in place; 0 where torch does not count."""
    return 0 if tensor.is_inference() else tensor._version


def wrapper_subclass(tensor: Tensor) -> str:
    """The name of a tensor subclass that wraps other tensors (a DTensor, a quantised weight), or ""."""
    return type(tensor).__name__ if is_traceable_wrapper_subclass(tensor) else ""

"""Tensor descriptors, made in little time: a call of a layer makes about a dozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from structfly.errors import UnsupportedError

ALIGNED = 16  # bytes: what tensor descriptors begin at and step by


def descriptor(tensor: Tensor, *box: int) -> Any:
    """Triton's ``TensorDescriptor`` of a tensor, which moves so many entries along each dimension at a time.

    A box that is one part of several has that dimension first: only then does a product take it from where it was put.
    Triton's own checks are made once for all tensors of one shape.

    Raises:
        UnsupportedError: the last dimension is not contiguous, or another does not step by multiples of 16 bytes, or
            the tensor does not begin at one.
    """
    key = tensor.shape, tensor.stride(), tensor.dtype, box
    checked = _CHECKED.get(key)
    if tensor.data_ptr() % ALIGNED or (checked is None and not _has_steps(tensor)):
        raise UnsupportedError(
            f"a {tuple(tensor.shape)} {tensor.dtype} operand of strides {tensor.stride()} that begins "
            f"{tensor.data_ptr() % ALIGNED} bytes after a multiple of {ALIGNED} in a generated product; its last "
            f"dimension must be contiguous, and the others begin at multiples of {ALIGNED} bytes"
        )
    from triton.tools.tensor_descriptor import TensorDescriptor

    if checked is None:
        made = TensorDescriptor.from_tensor(tensor, list(box))
        if len(_CHECKED) >= _MOST:
            _CHECKED.clear()
        _CHECKED[key] = {name: value for name, value in vars(made).items() if name != "base"}
        return made
    made = object.__new__(TensorDescriptor)
    made.__dict__.update(checked, base=tensor)
    return made


def operand(tensor: Tensor, *box: int) -> Any:
    """The :func:`descriptor` of what a product takes: of float32, numbers that may be rounded to TF32.

    They are rounded to nearest as they are loaded, where Triton's descriptors can (from 3.7 on); else tensor cores cut
    them off, for they read 10 bits of a mantissa.

    Raises:
        UnsupportedError: as :func:`descriptor`.
    """
    made = descriptor(tensor, *box)
    if tensor.dtype == torch.float32 and hasattr(made, "round_f32_to_tf32"):
        made.round_f32_to_tf32 = True
    return made


def has_descriptor(tensor: Tensor) -> bool:
    """Whether its last dimension is contiguous and all else begins at multiples of 16 bytes."""
    return tensor.data_ptr() % ALIGNED == 0 and _has_steps(tensor)


_MOST = 4096  # shapes that are remembered, a few hundred bytes each
_CHECKED: dict[tuple[torch.Size, tuple[int, ...], torch.dtype, tuple[int, ...]], dict[str, Any]] = {}


def _has_steps(tensor: Tensor) -> bool:
    *steps, last = tensor.stride()
    return last == 1 and all(step * tensor.element_size() % ALIGNED == 0 for step in steps)

"""Tensor descriptors, made in little time: a call of a layer makes about a dozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from structfly.errors import UnsupportedError
from structfly.lowering.cuda_driver import driver

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
    """The :func:`descriptor` of what a product takes: numbers of float32 are rounded to TF32 as they are loaded.

    Raises:
        UnsupportedError: as :func:`descriptor`.
    """
    made = descriptor(tensor, *box)
    if tensor.dtype == torch.float32:
        made.round_f32_to_tf32 = True  # a field of Triton's from 3.7 on; before that direct launches read it
    return made


def rounds_to_tf32(made: Any) -> bool:
    """Whether numbers are rounded to TF32 as they are loaded."""
    return bool(getattr(made, "round_f32_to_tf32", False))


def triton_rounds() -> bool:
    """Whether Triton's own launcher rounds them: it does from 3.7 on."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return "round_f32_to_tf32" in TensorDescriptor.__dataclass_fields__


def why_no_rounding() -> str:
    """Why operands of float32 would not be rounded, or "".

    Tensor cores read 10 bits of a mantissa: what is not rounded is cut off, and errors are several times as large.
    """
    if triton_rounds() or driver() is not None:
        return ""
    return (
        "neither this Triton nor this CUDA driver rounds them to TF32; Triton does from 3.7 on, with the driver of 12.4"
    )


def has_descriptor(tensor: Tensor) -> bool:
    """Whether its last dimension is contiguous and all else begins at multiples of 16 bytes."""
    return tensor.data_ptr() % ALIGNED == 0 and _has_steps(tensor)


_MOST = 4096  # shapes that are remembered, a few hundred bytes each
_CHECKED: dict[tuple[torch.Size, tuple[int, ...], torch.dtype, tuple[int, ...]], dict[str, Any]] = {}


def _has_steps(tensor: Tensor) -> bool:
    *steps, last = tensor.stride()
    return last == 1 and all(step * tensor.element_size() % ALIGNED == 0 for step in steps)

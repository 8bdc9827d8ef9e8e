"""Tensor descriptors, made in little time: a call of a layer makes about a dozen."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from structfly.errors import UnsupportedError
from structfly.lowering.cuda_driver import driver

ALIGNED = 16  # bytes: what tensor descriptors begin at and step by


class Form(NamedTuple):
    """What of a tensor its kernels depend on, apart from where it begins."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def like(self) -> Tensor:
        """A tensor of that form without numbers, for views that are made once for all tensors of the form."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")


def form(tensor: Tensor) -> Form:
    """That of a tensor."""
    return Form(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


class Boxes:
    """How a product takes tensors of one form: all of their descriptors but where they begin.

    Args:
        like: a tensor of that form without numbers, or a view of one; not kept.
        box: entries along each dimension that are moved at a time.  A box that is one part of several has that
            dimension first: only then does a product take it from where it was put.
        operand: whether numbers of float32 are rounded to TF32 as they are loaded.

    Raises:
        UnsupportedError: the last dimension is not contiguous, or another does not step by multiples of 16 bytes.
    """

    def __init__(self, like: Tensor, box: Sequence[int], *, operand: bool = False) -> None:
        from triton.tools.tensor_descriptor import TensorDescriptor

        shape, strides, dtype = like.shape, like.stride(), like.dtype
        if not _has_steps(like):
            raise UnsupportedError(_REFUSED.format(tuple(shape), dtype, strides, ""))
        fields = vars(TensorDescriptor.from_tensor(like, list(box)))
        self._fields = {name: value for name, value in fields.items() if name != "base"}
        if operand and dtype == torch.float32:
            self._fields["round_f32_to_tf32"] = True  # of Triton's from 3.7 on; before that direct launches read it
        self._make, self._refused = TensorDescriptor, (tuple(shape), dtype, strides)

    def of(self, tensor: Tensor) -> Any:
        """Triton's ``TensorDescriptor`` of what begins where ``tensor`` does.

        Raises:
            UnsupportedError: it does not begin at a multiple of 16 bytes.
        """
        beyond = tensor.data_ptr() % ALIGNED
        if beyond:
            raise UnsupportedError(_REFUSED.format(*self._refused, f" that begins {beyond} bytes after one of those"))
        made = object.__new__(self._make)
        fields = made.__dict__
        fields.update(self._fields)
        fields["base"] = tensor
        return made


_REFUSED = (
    "a {} {} operand of strides {}{} in a generated product; its last dimension must be contiguous, and the others "
    f"begin at multiples of {ALIGNED} bytes"
)


def descriptor(tensor: Tensor, *box: int) -> Any:
    """Triton's ``TensorDescriptor`` of a tensor, which moves so many entries along each dimension at a time.

    What depends on the tensor's form alone is made once for all of that form.

    Raises:
        UnsupportedError: as :class:`Boxes` and :meth:`Boxes.of`.
    """
    return _boxes(tensor.shape, tensor.stride(), tensor.dtype, box, operand=False).of(tensor)


def operand(tensor: Tensor, *box: int) -> Any:
    """The :func:`descriptor` of what a product takes: numbers of float32 are rounded to TF32 as they are loaded.

    Raises:
        UnsupportedError: as :func:`descriptor`.
    """
    return _boxes(tensor.shape, tensor.stride(), tensor.dtype, box, operand=True).of(tensor)


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


@lru_cache(maxsize=4096)  # a few hundred bytes each
def _boxes(
    shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, box: tuple[int, ...], *, operand: bool
) -> Boxes:
    return Boxes(torch.empty_strided(shape, strides, dtype=dtype, device="meta"), box, operand=operand)


def _has_steps(tensor: Tensor) -> bool:
    *steps, last = tensor.stride()
    return last == 1 and all(step * tensor.element_size() % ALIGNED == 0 for step in steps)

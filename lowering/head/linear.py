"""A head's linear, and the gradients of its operands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from structfly.lowering.head.chunks import saved_dtype, wide_dtype
from structfly.lowering.head.epilogue import Epilogue
from structfly.lowering.head.products import make_logits

# What ops of heads run on, and in.
DEVICES = ("cpu", "cuda")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# The arguments that have gradients, in the order of an op's ``gradients``, and how its schema returns them.
DIFFERENTIABLE = ("x", "weight", "bias", "adapter_x", "adapter_weight")
GRADIENTS = "Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_adapter_x, Tensor grad_adapter_weight"


@dataclass(frozen=True)
class Linear:
    """What makes logits: ``epilogue(x weight^T + adapter_scale adapter_x adapter_weight^T + bias)``, of the first
    ``num_classes`` classes; shapes as in
    :func:`~structfly.lowering.linear_cross_entropy.reference.linear_cross_entropy_reference`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    adapter_x: Tensor | None
    adapter_weight: Tensor | None
    adapter_scale: float
    epilogue: Epilogue
    operands: Sequence[Tensor]
    num_classes: int

    @property
    def accumulation(self) -> torch.dtype:
        """float32, float64 for float64 inputs: the dtype of losses and coefficients."""
        return wide_dtype(self.x.dtype)

    def multiply(self, logits: Tensor, part: slice) -> None:
        """Write the products of the rows ``part``, before bias and epilogue, to ``logits`` (R, C)."""
        make_logits(logits, self.x[part], self.weight)
        if self.adapter_x is not None and self.adapter_weight is not None:
            make_logits(logits, self.adapter_x[part], self.adapter_weight, add=True, alpha=self.adapter_scale)


@dataclass(frozen=True)
class Wanted:
    """Which gradients are wanted; of the epilogue's operands one by one."""

    x: bool = False
    weight: bool = False
    bias: bool = False
    adapter_x: bool = False
    adapter_weight: bool = False
    operands: tuple[bool, ...] = ()

    @classmethod
    def of(cls, flags: Sequence[bool]) -> Wanted:
        """Read the op's argument ``gradients``."""
        return _wanted(tuple(flags))

    @property
    def flags(self) -> tuple[bool, ...]:
        """The op's argument ``gradients``."""
        return (self.x, self.weight, self.bias, self.adapter_x, self.adapter_weight, *self.operands)

    @property
    def any(self) -> bool:
        return any(self.flags)


@lru_cache(maxsize=64)
def _wanted(flags: tuple[bool, ...]) -> Wanted:
    x, weight, bias, adapter_x, adapter_weight, *operands = flags
    return Wanted(x, weight, bias, adapter_x, adapter_weight, tuple(operands))


class Gradients(NamedTuple):
    """Gradients in the dtype of :func:`saved_dtype`; an empty tensor where one is not wanted."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    adapter_x: Tensor
    adapter_weight: Tensor
    operands: list[Tensor]

    @property
    def each(self) -> list[Tensor]:
        """All of them, those of the operands one by one, in the order of an op's ``gradients``."""
        return [*self[:5], *self.operands]


def in_dtypes_of(inputs: Sequence[Tensor | None], gradients: Sequence[Tensor]) -> list[Tensor]:
    """The gradients, each in the dtype of its input."""
    pairs = zip(gradients, inputs, strict=True)
    return [gradient if tensor is None else gradient.to(tensor.dtype) for gradient, tensor in pairs]


def allocate_gradients(head: Linear, wanted: Wanted) -> Gradients:
    """Uninitialised gradients of the inputs' shapes and strides; empty ones where not wanted.  Also the op's fake."""
    inputs = (head.x, head.weight, head.bias, head.adapter_x, head.adapter_weight)
    operands = wanted.operands or (False,) * len(head.operands)
    x, weight, bias, adapter_x, adapter_weight, *operand_gradients = (
        torch.empty_like(tensor, dtype=saved_dtype(tensor.dtype)) if want and tensor is not None else nothing(head)
        for tensor, want in zip((*inputs, *head.operands), (*wanted.flags[:5], *operands), strict=True)
    )
    return Gradients(x, weight, bias, adapter_x, adapter_weight, operand_gradients)


def nothing(head: Linear) -> Tensor:
    return head.x.new_empty(0)

"""What calls are refused, each with what was wrong, the value seen, what is allowed, and the remedy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from structfly import compat
from structfly.config.fields import parse_bytes
from structfly.errors import ArgumentError, UnsupportedError
from structfly.lowering.head.linear import DEVICES, DTYPES


def check_place(function: str, tensors: Mapping[str, Tensor | None]) -> None:
    """The tensors of a call, of which the first is there, must be plain and on one device that has kernels."""
    if compat.inside_functional_gradient():
        raise UnsupportedError(
            f"structfly.ops.{function} is called under torch.func.grad, vjp or jvp, which its op does not support; "
            "differentiate with torch.autograd.grad or backward(); torch.vmap is supported"
        )
    (first, leader), *_ = tensors.items()
    assert leader is not None
    if leader.device.type not in DEVICES:
        raise UnsupportedError(f"{first} is on {leader.device}; supported devices: {', '.join(DEVICES)}; move it there")
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        wrapper = compat.wrapper_subclass(tensor)
        if wrapper:
            raise UnsupportedError(f"{name} is a {wrapper}, for which the fused op has no rule; pass a plain tensor")
        if tensor.device != leader.device:
            raise ArgumentError(f"{name} is on {tensor.device} and {first} on {leader.device}; move one of them")


def products_dtype(tensors: Mapping[str, Tensor | None]) -> torch.dtype:
    """The dtype in which linears multiply ``tensors``, of which the first is there."""
    (first, leader), *_ = tensors.items()
    assert leader is not None
    kind = leader.device.type
    cast = torch.is_autocast_enabled(kind)
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES:
            raise ArgumentError(f"{name} is {tensor.dtype}; allowed: {', '.join(map(str, DTYPES))}; cast it")
        alike = (tensor.dtype == torch.float64) == (leader.dtype == torch.float64)
        if tensor.dtype != leader.dtype and not (cast and alike):
            raise ArgumentError(
                f"{name} is {tensor.dtype} and {first} {leader.dtype}; allowed: one dtype, or under autocast any but a "
                "single float64; cast one of them"
            )
    return torch.get_autocast_dtype(kind) if cast and leader.dtype != torch.float64 else leader.dtype


def check_mixed_dtypes(tensors: Mapping[str, Tensor | None]) -> None:
    """Floating-point dtypes may differ, but float64 all have, or none."""
    (first, leader), *_ = tensors.items()
    assert leader is not None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES:
            raise ArgumentError(f"{name} is {tensor.dtype}; allowed: {', '.join(map(str, DTYPES))}; cast it")
        if (tensor.dtype == torch.float64) != (leader.dtype == torch.float64):
            raise ArgumentError(
                f"{name} is {tensor.dtype} and {first} {leader.dtype}; allowed: float64 for all or for none; cast one "
                "of them"
            )


def check_shape(name: str, tensor: Tensor | None, shape: Sequence[int], meaning: str) -> None:
    """A tensor that is there must have ``shape``, which is ``meaning``."""
    if tensor is not None and tuple(tensor.shape) != tuple(shape):
        raise ArgumentError(f"{name} has shape {tuple(tensor.shape)}; allowed: {tuple(shape)}, {meaning}")


def check_weight(name: str, weight: Tensor, features: str, input: Tensor) -> None:
    """A weight has a row a class and the hidden units of its features."""
    if input.ndim == 0:
        raise ArgumentError(f"{features} has no dimensions; allowed: (..., hidden units)")
    if weight.ndim != 2 or weight.shape[1] != input.shape[-1]:
        raise ArgumentError(
            f"{name} has shape {tuple(weight.shape)} and {features} {tuple(input.shape)}; allowed: (classes, hidden "
            f"units) with the last dimension of {features}; pass {name}.t() for one stored (hidden units, classes)"
        )


def check_constant(name: str, tensor: Tensor | None, remedy: str) -> None:
    """A tensor that has no gradient in the op may not ask for one."""
    if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
        raise ArgumentError(f"{name} requires a gradient, which the op does not make; allowed: without; {remedy}")


def check_reduction(reduction: str) -> None:
    check_name("reduction", reduction, ("none", "sum", "mean"))


def check_name(name: str, value: str, allowed: Sequence[str]) -> None:
    """A name must be one of those."""
    if value not in allowed:
        raise ArgumentError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}")


def check_row_weight(row_weight: Tensor | None, shape: Sequence[int], reduction: str) -> None:
    """Row weights go with a sum."""
    check_shape("row_weight", row_weight, shape, "one for each row of input")
    check_constant("row_weight", row_weight, "multiply the losses of reduction='none' by it")
    if row_weight is not None and reduction != "sum":
        raise ArgumentError(
            f"row_weight is given with reduction={reduction!r}; allowed: 'sum'; divide that by what a mean is over, or "
            "multiply the losses of reduction='none'"
        )


def check_number(name: str, value: float, *, positive: bool = False) -> None:
    """A number must be finite, and above 0 if it is asked to be."""
    if not math.isfinite(value) or (positive and value <= 0.0):
        raise ArgumentError(f"{name} is {value}; allowed: finite{' and above 0' * positive}")


def check_smoothing(value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ArgumentError(f"label_smoothing is {value}; allowed: 0 to 1")


def memory_limit(value: str | None) -> int | None:
    """``loss_memory`` in bytes, of what :func:`as_text` made of it."""
    try:
        return parse_bytes(value)
    except ValueError as error:
        raise ArgumentError(f"loss_memory is {value!r}; {error}") from error


def as_text(loss_memory: int | str | None) -> str | None:
    """What stands for ``loss_memory`` in an op's arguments."""
    return f"{loss_memory} B" if isinstance(loss_memory, int) else loss_memory

"""What the op of a layer is made of: the steps of its forward, and its backward, on matrices.

A structure may have several ways of making its products, of which one is chosen in each call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Applied(NamedTuple):
    """What an op is applied to: hidden states, the weight's factors, and the op's numbers.

    ``x`` (N, in); ``factors`` in the op's order, with the integer tensors that say where they stand; ``bias`` (out,)
    where the op's second step adds it; ``activation``, where that step applies it, or ""; ``tf32``, whether generated
    products may round float32 operands to TF32; torch's own products follow the setting themselves.
    """

    x: Tensor
    factors: Sequence[Tensor]
    static: Sequence[int]
    bias: Tensor | None = None
    activation: str = ""
    tf32: bool = False


def room_beside_factors(call: Applied) -> int:
    """Numbers of the dense weight, whose gradient that layer's backward makes, beyond those of the factors."""
    return call.x.shape[1] * call.static[0] - sum(factor.numel() for factor in call.factors)


# What is made on the way to y, and y (N, out) from that, with the bias of what it is applied to.
Between = Callable[[Applied], list[Tensor]]
Finish = Callable[[Applied, Sequence[Tensor]], Tensor]
# (gradient (N, out), applied to, made between, wanted: of x and each factor) -> gradients, None where not wanted
Backward = Callable[[Tensor, Applied, Sequence[Tensor], Sequence[bool]], list[Tensor | None]]


class Products(NamedTuple):
    """One way of making an op's products."""

    between: Between
    finish: Finish
    backward: Backward


def is_traced(*tensors: Tensor) -> bool:
    """Whether what is made of these is differentiated, which leaves no trace in generated products."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def chosen(generated: Callable[[Applied], Products | None], by_torch: Products) -> Products:
    """What ``generated`` has for a call; torch's where it has nothing, or what is made is differentiated."""

    def of(call: Applied, *others: Tensor) -> Products:
        made = None if is_traced(call.x, *call.factors, *others) else generated(call)
        return made or by_torch

    return Products(
        lambda call: of(call).between(call),
        lambda call, between: of(call).finish(call, between),
        lambda grad, call, between, wanted: of(call, grad).backward(grad, call, between, wanted),
    )


class InChunks(NamedTuple):
    """A backward, and perhaps a forward, that never has all of what is made between, for calls that keep nothing of it.

    ``why_not`` says of a call why it is not for it, or ""; ``forward`` gives y, as ``finish`` does, and is None where a
    forward may as well have all.
    """

    why_not: Callable[[Applied], str]
    backward: Callable[[Tensor, Applied, Sequence[bool]], list[Tensor | None]]
    forward: Callable[[Applied], Tensor] | None = None

"""Differentiating twice through an op that does not support it is refused, never answered with zeros."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from structfly.errors import UnsupportedError


def refuse_second_derivative(
    gradients: Iterable[Tensor | None], sources: Sequence[Tensor], message: str
) -> list[Tensor | None]:
    """The gradients, whose own derivative with respect to ``sources`` raises UnsupportedError with ``message``."""
    apply: Any = _Refusal.apply
    return [None if gradient is None else apply(message, gradient, *sources) for gradient in gradients]


class _Refusal(torch.autograd.Function):
    """Identity whose backward raises."""

    @staticmethod
    def forward(ctx: Any, message: str, gradient: Tensor, *sources: Tensor) -> Tensor:
        ctx.message = message
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise UnsupportedError(ctx.message)

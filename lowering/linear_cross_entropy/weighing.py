"""What a reduction, and the gradient of its result, make of the rows' losses."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from structfly.lowering.head.reduction import reduced, row_coefficients, upstream_coefficients
from structfly.lowering.linear_cross_entropy.arguments import Arguments
from structfly.lowering.linear_cross_entropy.chunked import Head


class Weighing:
    """Weights, normaliser and coefficients, computed when they are asked for: after the first product is launched, in
    the schemes that can wait.

    Args:
        grad_loss: the gradient of the loss, or None for one.
    """

    def __init__(self, call: Arguments, head: Head, grad_loss: Tensor | None = None) -> None:
        self._call, self._head, self._grad_loss = call, head, grad_loss
        self._count: Tensor | None = None

    @cached_property
    def weights(self) -> tuple[Tensor | None, Tensor]:
        """``loss = sum_n weight_n loss_n / count``; None means ones, the count is float64."""
        call, dtype = self._call, self._head.accumulation
        if call.reduction == "mean" and call.target is not None:
            if call.class_weight is None and self._count is not None:
                return None, self._count.double()
            if call.class_weight is None and call.ignore_index is None:
                return None, torch.full((), len(call.target), dtype=torch.float64, device=call.x.device)
            live = torch.ones_like(call.target) if call.ignore_index is None else call.target != call.ignore_index
            if call.class_weight is not None:
                live = live * call.class_weight.to(dtype)[torch.where(live != 0, call.target, 0)]
            return None, live.sum(dtype=torch.float64)
        weight = None if call.row_weight is None else call.row_weight.to(dtype)
        return weight, torch.ones((), dtype=torch.float64, device=call.x.device)

    @cached_property
    def coefficients(self) -> tuple[Tensor | None, Tensor]:
        """What the rows' losses are multiplied with, None for ones, and what is left over for the gradients."""
        (weight, count), head, largest = self.weights, self._head, self.largest_gradient
        if self._grad_loss is None:
            return row_coefficients(head, weight, count, largest=largest)
        return upstream_coefficients(head, self._call.reduction, weight, count, self._grad_loss, largest)

    def late_coefficients(self, count: Tensor) -> Tensor:
        """The first of these, of a dtype with the range for all of it, where ``count`` () rows are not ignored."""
        self._count = count
        coefficients, _ = self.coefficients
        assert coefficients is not None
        return coefficients

    @property
    def largest_gradient(self) -> Tensor | float:
        """How large a row of coefficient 1 makes the gradient of what the softmax sees."""
        class_weight = self._call.class_weight
        return 1.0 if class_weight is None else class_weight.to(self._head.accumulation).amax()

    @property
    def chosen(self) -> Tensor | None:
        """(N,) of which an entry of 0 leaves a row out, or None."""
        return self._grad_loss if self._call.reduction == "none" else self._call.row_weight

    def reduced(self, losses: Tensor) -> Tensor:
        """The loss, in the accumulation's dtype or float64."""
        return reduced(losses, self._call.reduction, *self.weights)

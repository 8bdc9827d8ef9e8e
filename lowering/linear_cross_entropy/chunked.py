"""The head in chunks of rows: logits of one chunk exist at a time, overwritten by their own gradient.

Per chunk of R rows: z = x W^T (2RHC operations), the row step makes losses and dz in place, dx = dz W and
dW += dz^T x (4RHC), so a forward that makes its gradients costs 6NHC in all, the same three products as eager.
The scheme is that of Liger (Hsu et al. 2024) and of torch's chunked op; here the row step, the sums' dtypes and the
chunk length follow :mod:`~structfly.lowering.linear_cross_entropy.schedule`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from structfly.lowering.linear_cross_entropy.epilogue import Epilogue
from structfly.lowering.linear_cross_entropy.products import from_classes, make_logits, to_classes
from structfly.lowering.linear_cross_entropy.rows import ClassTerms, RowStep
from structfly.lowering.linear_cross_entropy.schedule import (
    accumulation_dtype,
    gradient_scale,
    row_stride,
    rows_per_chunk,
    saved_dtype,
)


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
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32

    def multiply(self, logits: Tensor, part: slice) -> None:
        """Write the products of the rows ``part``, before bias and epilogue, to ``logits`` (R, C)."""
        make_logits(logits, self.x[part], self.weight)
        if self.adapter_x is not None and self.adapter_weight is not None:
            make_logits(logits, self.adapter_x[part], self.adapter_weight, add=True, alpha=self.adapter_scale)


@dataclass(frozen=True)
class Head(Linear):
    """The inputs of the head."""

    target: Tensor
    class_weight: Tensor | None
    ignore_index: int | None
    label_smoothing: float


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
        x, weight, bias, adapter_x, adapter_weight, *operands = flags
        return cls(x, weight, bias, adapter_x, adapter_weight, tuple(operands))

    @property
    def flags(self) -> tuple[bool, ...]:
        """The op's argument ``gradients``."""
        return (self.x, self.weight, self.bias, self.adapter_x, self.adapter_weight, *self.operands)

    @property
    def any(self) -> bool:
        return any(self.flags)


class Gradients(NamedTuple):
    """Gradients in the dtype of :func:`saved_dtype`; an empty tensor where one is not wanted."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    adapter_x: Tensor
    adapter_weight: Tensor
    operands: list[Tensor]


def allocate_gradients(head: Linear, wanted: Wanted) -> Gradients:
    """Uninitialised gradients of the inputs' shapes and strides; empty ones where not wanted.  Also the op's fake."""
    inputs = (head.x, head.weight, head.bias, head.adapter_x, head.adapter_weight)
    operands = wanted.operands or (False,) * len(head.operands)
    x, weight, bias, adapter_x, adapter_weight, *operand_gradients = (
        torch.empty_like(tensor, dtype=saved_dtype(tensor.dtype)) if want and tensor is not None else _nothing(head)
        for tensor, want in zip((*inputs, *head.operands), (*wanted.flags[:5], *operands), strict=True)
    )
    return Gradients(x, weight, bias, adapter_x, adapter_weight, operand_gradients)


def _nothing(head: Linear) -> Tensor:
    return head.x.new_empty(0)


def class_terms(head: Head, operand_gradients: tuple[bool, ...] = ()) -> ClassTerms:
    """What the rows share, restricted to the live classes, and the operands of all rows."""
    classes = slice(head.num_classes)
    weight = None if head.class_weight is None else head.class_weight.to(head.accumulation)
    conditions = head.epilogue.conditions
    return ClassTerms(
        epilogue=head.epilogue,
        operands=tuple(o if i in conditions else o.to(head.accumulation) for i, o in enumerate(head.operands)),
        operand_gradients=operand_gradients or (False,) * len(head.operands),
        bias=None if head.bias is None else head.bias[classes],
        weight=weight,
        weight_sum=None if weight is None else weight.sum(),
        label_smoothing=head.label_smoothing,
        ignore_index=head.ignore_index,
        gradient_scale=gradient_scale(head.x.dtype),
    )


def run_chunks(
    head: Head,
    coefficient: Tensor | None,
    wanted: Wanted | None,
    workspace: int,
    row_step: RowStep,
) -> tuple[Tensor, Gradients | None]:
    """Losses of all rows and, where ``wanted`` is given, gradients of ``sum_n coefficient_n loss_n``.

    Args:
        coefficient: (N,) in ``head.accumulation``, or None for ones.
        wanted: None computes losses alone (2NHC operations).
        workspace: bytes the logits of one chunk may take.
        row_step: the row step for the device.

    Returns:
        (N,) losses in ``head.accumulation`` and the gradients.
    """
    rows, dtype = head.x.shape[0], head.x.dtype
    terms = class_terms(head, () if wanted is None else wanted.operands)
    length = rows_per_chunk(rows, head.num_classes, dtype, workspace)
    losses = torch.empty(rows, dtype=head.accumulation, device=head.x.device)
    sums = None if wanted is None else GradientSums(head, wanted, -(-rows // length), terms.gradient_scale)
    buffer = head.x.new_empty(length, row_stride(head.num_classes))
    for start in range(0, rows, length):
        part = slice(start, min(start + length, rows))
        logits = buffer[: part.stop - start, : head.num_classes]
        head.multiply(logits, part)
        row_coefficient = None if coefficient is None else coefficient[part]
        results = row_step(logits, head.target[part], row_coefficient, terms.of_rows(part), gradient=sums is not None)
        losses[part] = results.losses
        if sums is not None:
            sums.add(logits, part, results.operand_sums)
        del logits
    del buffer  # before the gradients are rounded, which takes memory of its own
    return losses, None if sums is None else sums.gradients()


class GradientSums:
    """The gradient products of one chunk after another, each summed in the dtype the schedule asks for.

    A gradient of another dtype than its sum is allocated at the end, when the chunk's logits are gone.

    Args:
        chunks: how many there will be.
        scale: what the logits' gradients that are added were multiplied by.
    """

    def __init__(self, head: Linear, wanted: Wanted, chunks: int, scale: float) -> None:
        self._head, self._wanted = head, wanted
        self._unscale = 1.0 / scale
        rows = Wanted(x=wanted.x, adapter_x=wanted.adapter_x)
        self._rows = allocate_gradients(head, rows)
        self._weight = self._sum(wanted.weight, head.weight, chunks)
        self._bias = None
        if wanted.bias and head.bias is not None:
            self._bias = torch.zeros_like(head.bias, dtype=head.accumulation)
        self._adapter = self._sum(wanted.adapter_weight, head.adapter_weight, chunks)
        sizes = {"class": head.num_classes, "row": head.x.shape[0], "scalar": head.x.shape[0]}
        self._operands = {
            operand.index: head.x.new_zeros(sizes[operand.kind], dtype=head.accumulation)
            for operand, want in zip(head.epilogue.operands, wanted.operands, strict=True)
            if want
        }

    def _sum(self, want: bool, parameter: Tensor | None, chunks: int) -> Tensor | None:
        if not want or parameter is None:
            return None
        total = torch.empty_like(parameter, dtype=accumulation_dtype(parameter.dtype, chunks))
        # The first chunk writes the live classes; nothing else writes the others, or anything where there are no rows.
        total[self._head.num_classes if chunks else 0 :].zero_()
        return total

    def add(self, dz: Tensor, part: slice, operand_sums: Sequence[Tensor] = ()) -> None:
        """Add the chunk ``part`` whose logits' gradient is ``dz`` (R, C)."""
        head, unscale = self._head, self._unscale
        scale = unscale * head.adapter_scale
        add = part.start > 0
        if self._wanted.x:
            from_classes(self._rows.x[part], dz, head.weight, unscale)
        if self._weight is not None:
            to_classes(self._weight, dz, head.x[part], unscale, add=add)
        if self._bias is not None:
            self._bias[: head.num_classes].add_(dz.sum(0, dtype=self._bias.dtype), alpha=unscale)
        if self._wanted.adapter_x and head.adapter_weight is not None:
            from_classes(self._rows.adapter_x[part], dz, head.adapter_weight, scale)
        if self._adapter is not None and head.adapter_x is not None:
            to_classes(self._adapter, dz, head.adapter_x[part], scale, add=add)
        for (operand, total), share in zip(self._operands.items(), operand_sums, strict=True):
            if head.epilogue.operands[operand].kind == "class":
                total.add_(share)
            else:
                total[part] = share

    def gradients(self) -> Gradients:
        """All gradients, rounded to their own dtypes."""
        head = self._head
        return Gradients(
            x=self._rows.x,
            weight=self._rounded(self._weight, head.weight),
            bias=self._rounded(self._bias, head.bias),
            adapter_x=self._rows.adapter_x,
            adapter_weight=self._rounded(self._adapter, head.adapter_weight),
            operands=[self._rounded(self._of_operand(i), operand) for i, operand in enumerate(head.operands)],
        )

    def _of_operand(self, operand: int) -> Tensor | None:
        total = self._operands.get(operand)
        if total is None or self._head.epilogue.operands[operand].kind != "scalar":
            return total
        return total.sum(dtype=torch.float64)

    def _rounded(self, total: Tensor | None, parameter: Tensor | None) -> Tensor:
        if total is None or parameter is None:
            return _nothing(self._head)
        return total.to(saved_dtype(parameter.dtype))

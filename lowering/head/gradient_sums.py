"""The gradient products of a head's chunks, and their sums."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from structfly.lowering.head.chunks import accumulation_dtype, saved_dtype
from structfly.lowering.head.linear import Gradients, Linear, Wanted, allocate_gradients, nothing
from structfly.lowering.head.products import from_classes, to_classes


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
            return nothing(self._head)
        return total.to(saved_dtype(parameter.dtype))

"""The row step of the chunked loss head: from a chunk of logits to its losses and, in place, to their gradient.

For one row with raw logits z (float32), bias b, chain f, target t, class weights w, smoothing s and row coefficient c,
over C classes:

    u_v  = f(z_v + b_v)
    lse  = log sum_v exp(u_v),   p_v = exp(u_v - lse)
    loss = (1 - s) w_t (lse - u_t)  +  s/C sum_v w_v (lse - u_v)
    du_v = c [ (a + s/C sum_v w_v) p_v - a [v = t] - s/C w_v ],   a = (1 - s) w_t
    dz_v = f'(z_v + b_v) du_v

The chain is f = f_k(...f_1), each f_i with operands of its own.  Going backwards from g_k = du, g_{i-1} = f_i' g_i ends
in dz, and on the way an operand o of f_i has the gradient sum_v g_i df_i/do: over one row if it is the row's, over all
rows too if it is one number, and over the rows alone, v by v, if it is the classes'.

An ignored row (t equal to ignore_index) and a row with c = 0 have loss 0 and gradients 0.  The returned losses do not
carry c.  dz, and nothing else, is multiplied by ``gradient_scale``, a power of two that keeps float16 normal, before it
is rounded to the logits' dtype.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from torch import Tensor

from structfly.lowering.head.epilogue import Epilogue


@dataclass(frozen=True)
class ClassTerms:
    """What is the same for every row, and the chain's operands.

    Attributes:
        epilogue: the pointwise chain f.
        operands: its tensors, shaped as it says for the rows at hand; conditions are bool, others in the accumulation
            dtype.
        operand_gradients: whether the gradient with respect to each operand is wanted.
        bias: (C,) any float dtype, or None.
        weight: (C,) float32 (float64 for float64 logits) class weights, or None for ones.
        weight_sum: () sum of ``weight``, or None where ``weight`` is None.
        label_smoothing: s in [0, 1].
        ignore_index: the target value of ignored rows, or None if no value is ignored.
        gradient_scale: power of two applied to dz.
    """

    epilogue: Epilogue
    operands: tuple[Tensor, ...]
    operand_gradients: tuple[bool, ...]
    bias: Tensor | None
    weight: Tensor | None
    weight_sum: Tensor | None
    label_smoothing: float
    ignore_index: int | None
    gradient_scale: float

    def by_class(self, operand: int) -> bool:
        """Whether an operand has one number for each class."""
        return self.epilogue.operands[operand].kind == "class"

    def of_rows(self, part: slice) -> ClassTerms:
        """The same with the operands of some of the rows at hand."""
        kinds = [operand.kind for operand in self.epilogue.operands]
        operands = (o[part] if kind == "row" else o for o, kind in zip(self.operands, kinds, strict=True))
        return replace(self, operands=tuple(operands))


class RowResults(NamedTuple):
    """What the row step makes of R rows, in the accumulation dtype: float32, float64 for float64 logits.

    Attributes:
        losses: (R,).
        operand_sums: for each operand whose gradient is wanted, in order, the rows' share of it: (C,) for one that is
            the classes', else (R,), each row's part of the sum.  Empty without gradients.
    """

    losses: Tensor
    operand_sums: tuple[Tensor, ...] = ()


class RowStep(Protocol):
    """Turns logits into losses and, where asked, into dz in place.

    Args:
        logits: (R, C), unit column stride, any row stride, overwritten: by dz if ``gradient``, else by scratch values.
        target: (R,) int64, in range or equal to the ignore index.
        coefficient: (R,) c in the accumulation dtype, or None for ones; only read if ``gradient``.
        terms: what all rows share, and the operands of these rows.
        gradient: whether dz, and the operands' gradients, are wanted.
    """

    def __call__(
        self, logits: Tensor, target: Tensor, coefficient: Tensor | None, terms: ClassTerms, *, gradient: bool
    ) -> RowResults: ...

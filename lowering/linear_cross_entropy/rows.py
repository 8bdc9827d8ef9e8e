"""The row step of the chunked loss head: from a chunk of logits to its losses and, in place, to their gradient.

For one row with raw logits z (float32), bias b, chain f, class mask m, target t, class weights w, smoothing s and
row coefficient c, over C classes:

    u_v  = f(z_v + b_v), and -inf where m_v is False
    lse  = log sum_v exp(u_v),   p_v = exp(u_v - lse)
    loss = (1 - s) w_t (lse - u_t)  +  s/C sum_v w_v (lse - u_v)
    dz_v = c f'(z_v + b_v) [ (a + s/C sum_v w_v) p_v - a [v = t] - s/C w_v ],   a = (1 - s) w_t

An ignored row (t equal to ignore_index) and a row with c = 0 have loss 0 and dz 0.  The returned losses do not carry c.
dz is multiplied by ``gradient_scale``, a power of two that keeps float16 normal, before it is rounded to the logits'
dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from structfly.lowering.linear_cross_entropy.epilogue import Epilogue


@dataclass(frozen=True)
class ClassTerms:
    """What is the same for every row.

    Attributes:
        epilogue: the pointwise chain f.
        bias: (C,) any float dtype, or None.
        mask: (C,) bool, True where a class is live, or None.
        weight: (C,) float32 (float64 for float64 logits) class weights, or None for ones.
        weight_sum: () sum of ``weight``, or None where ``weight`` is None.
        label_smoothing: s in [0, 1].
        ignore_index: the target value of ignored rows, or None if no value is ignored.
        gradient_scale: power of two applied to dz.
    """

    epilogue: Epilogue
    bias: Tensor | None
    mask: Tensor | None
    weight: Tensor | None
    weight_sum: Tensor | None
    label_smoothing: float
    ignore_index: int | None
    gradient_scale: float


class RowStep(Protocol):
    """Turns logits into losses and, where asked, into dz in place.

    Args:
        logits: (R, C), unit column stride, any row stride, overwritten: by dz if ``gradient``, else by scratch values.
        target: (R,) int64, in range or equal to the ignore index.
        coefficient: (R,) c in the accumulation dtype, or None for ones; only read if ``gradient``.
        terms: what all rows share.
        gradient: whether dz is wanted.

    Returns:
        (R,) losses in the accumulation dtype: float32, float64 for float64 logits.
    """

    def __call__(
        self, logits: Tensor, target: Tensor, coefficient: Tensor | None, terms: ClassTerms, *, gradient: bool
    ) -> Tensor: ...

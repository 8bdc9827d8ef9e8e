"""The row step of the chunked loss head: from a chunk of logits to what is asked of its rows and, in place, to dz.

For one row with raw logits z (float32), bias b, chain f, target t, class weights w and smoothing s, over C classes:

    u_v     = f(z_v + b_v)
    lse     = log sum_v exp(u_v),   p_v = exp(u_v - lse)
    loss    = (1 - s) w_t (lse - u_t)  +  s/C sum_v w_v (lse - u_v)
    entropy = -sum_v p_v log p_v,  where a dead class (u_v = -inf) adds 0
    argmax  = the first v of largest u_v, or of NaN where there is one, as :func:`torch.argmax` on CPUs
    chosen  = u at further classes j_1, ..., j_K of the row

With coefficients c, g, h and k_1, ..., k_K, du is the derivative by u of
c loss + g lse + h entropy + sum_i k_i chosen_i, in which, with a = (1 - s) w_t,

    d loss / du_v     = (a + s/C sum_v w_v) p_v - a [v = t] - s/C w_v
    d lse / du_v      = p_v
    d entropy / du_v  = -sum_w dp_w/du_v (log p_w + 1) = -p_v (log p_v + entropy),   dp_w/du_v = p_w ([v = w] - p_v)
    d chosen_i / du_v = [v = j_i]

and dz_v = f'(z_v + b_v) du_v.  The chain is f = f_k(...f_1), each f_i with operands of its own.  Going backwards from
g_k = du, g_{i-1} = f_i' g_i ends in dz, and on the way an operand o of f_i has the gradient sum_v g_i df_i/do: over one
row if it is the row's, over all rows too if it is one number, and over the rows alone, v by v, if it is the classes'.

An ignored row (t equal to ignore_index) has loss 0, without gradient; its other statistics are made like any row's.
A row whose coefficients are all 0 has dz 0, whatever its logits, and loss 0 where nothing but losses is asked: it is
left out.  The returned statistics do not carry coefficients.  dz, and nothing else, is multiplied by
``gradient_scale``, a power of two that keeps float16 normal, before it is rounded to the logits' dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
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


class Indices(NamedTuple):
    """Classes that the rows name: ``target`` (R,) int64, in range or equal to the ignore index, or None without a loss,
    and ``choices`` (R, K) int64, in range, or None."""

    target: Tensor | None
    choices: Tensor | None = None

    def rows(self, part: slice) -> Indices:
        """Those of some rows."""
        return Indices(*(None if each is None else each[part] for each in self))


class RowStatistics(NamedTuple):
    """What was asked of R rows, else None; in the accumulation dtype: float32, float64 for float64 logits.

    ``loss``, ``lse`` and ``entropy`` (R,), ``argmax`` (R,) int64, ``chosen`` (R, K).
    """

    loss: Tensor | None = None
    lse: Tensor | None = None
    entropy: Tensor | None = None
    argmax: Tensor | None = None
    chosen: Tensor | None = None


class Coefficients(NamedTuple):
    """The factors of the statistics in what is differentiated, in the accumulation dtype; None for 0.

    ``loss``, ``lse`` and ``entropy`` (R,), ``chosen`` (R, K).  ``loss`` may also be 1.0, for ones.
    """

    loss: Tensor | float | None = None
    lse: Tensor | None = None
    entropy: Tensor | None = None
    chosen: Tensor | None = None

    @property
    def loss_rows(self) -> Tensor | None:
        """The loss's coefficients where they are a tensor."""
        return self.loss if isinstance(self.loss, Tensor) else None

    @property
    def others(self) -> bool:
        """Whether something else than the loss has coefficients."""
        return any(each is not None for each in self[1:])

    def rows(self, part: slice) -> Coefficients:
        """Those of some rows."""
        lse, entropy, chosen = (None if each is None else each[part] for each in self[1:])
        return Coefficients(self.loss[part] if isinstance(self.loss, Tensor) else self.loss, lse, entropy, chosen)


class RowFunction(Protocol):
    """A loss of each group of rows as a function of their statistics, from which the coefficients follow."""

    @property
    def group_rows(self) -> int:
        """How many rows, one after another, make a group."""
        ...

    def rows(self, part: slice) -> RowFunction:
        """That of some rows, which are whole groups."""
        ...

    def differentiate(self, found: RowStatistics) -> tuple[Tensor, Coefficients]:
        """The losses of R rows' groups, (R / group_rows,), and the derivatives of their sum by the statistics."""
        ...


class RowResults(NamedTuple):
    """What the row step makes of R rows, in the accumulation dtype.

    Attributes:
        statistics: what was asked for.
        losses: those of a :class:`RowFunction`, one a group, else None.
        operand_sums: for each operand whose gradient is wanted, in order, the rows' share of it: (C,) for one that is
            the classes', else (R,), each row's part of the sum.  Empty without gradients.
    """

    statistics: RowStatistics
    losses: Tensor | None = None
    operand_sums: tuple[Tensor, ...] = ()


def joined(parts: Sequence[RowStatistics]) -> RowStatistics:
    """The statistics of rows one part after another."""
    if len(parts) == 1:
        return parts[0]
    return RowStatistics(*(None if each[0] is None else torch.cat(each) for each in zip(*parts, strict=True)))


class RowStep(Protocol):
    """Makes statistics of a chunk's rows and, where asked, dz in place.

    Args:
        logits: (R, C), unit column stride, any row stride, overwritten: by dz where it is wanted, else by scratch
            values.  The rows are whole groups of a function.
        indices: the target, which a loss needs, and the choices, which ``chosen`` needs.
        coefficients: of the statistics, or the function that gives them once the statistics are known, or None.
        terms: what all rows share, and the operands of these rows.
        asked: names of :class:`RowStatistics`' fields; where ``coefficients`` are a function, lse and those it reads.
        gradient: whether dz, and the operands' gradients, are wanted, which takes coefficients.
    """

    def __call__(
        self,
        logits: Tensor,
        indices: Indices,
        coefficients: Coefficients | RowFunction | None,
        terms: ClassTerms,
        asked: Sequence[str] = ("loss",),
        *,
        gradient: bool,
    ) -> RowResults: ...

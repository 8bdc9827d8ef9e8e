"""The tensors of the pointwise chain, and gradients of these and of the bias, in the schemes of generated products.

With u = f(z; o), e = exp(u - r), s their sum along a row, and c_n the coefficient of row n's loss, the gradient of an
operand o is a sum of c_n (p_nv - [v = t_n]) du_nv/do over what o is the same for, p = e / s.

* One number, or one a row: along a row that is (c_n / s_n) sum_v e_nv (du_nv/do - du_nt/do), v other than t.  The sum
  is made where the exponentials are, in float32, and the factor is known once all tiles have s.  Taken off inside the
  sum, not after it, the target's du/do leaves no cancellation where the row is all but certain of its target.
* One a class, added in one of the leading steps, whose slopes are the same for all classes of a row: with
  E_nv = f''_nv (e_nv - [v = t_n] s_n), f'' the slope of the steps after the leading ones, that is a sum over rows of
  E_nv and a factor of the row: c_n / s_n times the slopes of the leading steps after this one.  The bias comes before
  the first.  So one reading of the exponentials makes all of these; the target's entry is taken as it was before it was
  rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from structfly.lowering.head.epilogue import Epilogue
from structfly.lowering.head.linear import Gradients
from structfly.lowering.launch import Launch
from structfly.lowering.linear_cross_entropy.live_rows import LiveRows
from structfly.lowering.linear_cross_entropy.rows import ClassTerms
from structfly.lowering.template import Parameter, load, render

_ROWS, _COLUMNS = 32, 128  # of exponentials that a program sums at a time


class ChainOperands:
    """Operands and the sums of their gradients, of all rows and of a chunk's.

    Args:
        terms: the chain, without the steps that set classes to -inf at its end, its operands, and which of these want a
            gradient.
        bias_gradient: whether the bias wants one.
        classes: of the head.

    Attributes:
        vectors: how many numbers each row of a chunk takes.
        by_row: operands with gradients, of one number or one a row.
        by_class: those with one a class.
        row_values: (row operands, length) float32 of the chunk's rows.
        at_target: (by_row, length) float32 du/do at the rows' targets.
        row_sums: (by_row, rows) float32 gradients along rows, 0 where a row does not count.
        weights: (bias and by_class, length) float32 factors of the chunk's rows in the sums over them.
        label: (length,) int32 the chunk's targets.
    """

    def __init__(self, terms: ClassTerms, *, bias_gradient: bool, classes: int) -> None:
        self._epilogue, self._operands, self._classes = terms.epilogue, terms.operands, classes
        self._bias_gradient = bias_gradient
        wanted = [o for o in self._epilogue.operands if terms.operand_gradients and terms.operand_gradients[o.index]]
        self.by_row = tuple(o.index for o in wanted if o.kind != "class")
        self.by_class = tuple(o.index for o in wanted if o.kind == "class")
        self._of_rows = tuple(o.index for o in self._epilogue.operands if o.kind == "row")
        self._vectors = (len(self._of_rows), len(self.by_row), self.sums_over_rows)
        self.vectors = sum(self._vectors)

    def allocate(self, vectors: Tensor, rows: LiveRows) -> None:
        """Take ``vectors`` (:attr:`vectors`, length) float32, and allocate what else is needed."""
        self.row_values, self.at_target, self.weights = vectors.split_with_sizes(self._vectors)
        self.row_sums = vectors.new_zeros(len(self.by_row), len(rows.index)) if self.by_row else vectors[:0]
        self.label = rows.index.new_empty(vectors.shape[1]) if self.keeps_label else rows.index

    @property
    def sums_over_rows(self) -> int:
        """How many gradients have a number for each class."""
        return self._bias_gradient + len(self.by_class)

    @property
    def keeps_label(self) -> bool:
        """Whether a sum tells a row's target from its other classes."""
        return bool(self.by_row or self.sums_over_rows)

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        """What the templates of products and of rows both take of the chain."""
        return _parameters(self._epilogue, self.by_row)

    @property
    def row_parameters(self) -> Mapping[str, Parameter]:
        """What the template of rows takes besides."""
        return _row_parameters(self._epilogue, self.by_class, self.keeps_label, self._bias_gradient)

    @cached_property
    def pointers(self) -> list[Tensor]:
        """The operands that the chain reads, of all rows."""
        given = (self._operands[operand.index] for operand in self._epilogue.operands)
        return [(each.view(torch.uint8) if each.dtype == torch.bool else each).contiguous() for each in given]

    @cached_property
    def chunk_pointers(self) -> list[Tensor]:
        """The same with those of the chunk's rows."""
        of_rows = dict(zip(self._of_rows, self.row_values, strict=True))
        pairs = zip(self._epilogue.operands, self.pointers, strict=True)
        return [of_rows.get(operand.index, whole) for operand, whole in pairs]

    @cached_property
    def _totals(self) -> Tensor:
        return torch.zeros(self.sums_over_rows, self._classes, device=self.weights.device)

    def column_sums(self, exps: Tensor, entry: Tensor) -> Launch:
        """Adds a chunk's rows to the sums over rows; a call's arguments are :attr:`LiveRows.count` and the first.

        Args:
            exps: (length, classes) as of :class:`~structfly.lowering.linear_cross_entropy.pass_records.ChunkRows`.
            entry: (length,), of the same.
        """
        return self._column_sums(exps, 0, self.label, entry, weighted=True)

    def block_sums(self, dz: Tensor, first_class: int, label: Tensor, entry: Tensor) -> Launch:
        """The same of a block that is the logits' gradient itself, for the bias.

        Args:
            dz: (rows, classes) of the block.
            first_class: of the block.
            label, entry: (N,) as of :class:`~structfly.lowering.linear_cross_entropy.pass_records.KeptRows`.
        """
        return self._column_sums(dz, first_class, label, entry, weighted=False)

    def _column_sums(self, terms: Tensor, first_class: int, label: Tensor, entry: Tensor, *, weighted: bool) -> Launch:
        length, width = terms.shape
        return Launch(
            _module(self.sums_over_rows, weighted).column_sums,
            (-(-width // _COLUMNS),),
            {"CLASSES": self._classes, "ROWS": _ROWS, "COLUMNS": _COLUMNS},
            [
                *(length, width, first_class, terms, terms.stride(0), label, entry, self.weights),
                self._totals[:, first_class:],
            ],
        )

    def finish(self, made: Gradients, smoothed: Tensor | None) -> None:
        """Round the sums to the gradients of bias and operands in ``made``.

        Args:
            smoothed: (classes,) what label smoothing takes off the bias's, or None.
        """
        totals = self._totals
        if self._bias_gradient:
            made.bias[: self._classes].copy_(totals[0] if smoothed is None else totals[0] - smoothed)
            made.bias[self._classes :].zero_()
        for operand, total in zip(self.by_class, totals[int(self._bias_gradient) :], strict=True):
            made.operands[operand].copy_(total)
        for operand, along in zip(self.by_row, self.row_sums, strict=True):
            one = self._operands[operand].ndim == 0
            made.operands[operand].copy_(along.sum(dtype=torch.float64) if one else along)


@lru_cache(maxsize=256)
def _parameters(chain: Epilogue, by_row: tuple[int, ...]) -> Mapping[str, Parameter]:
    return {
        "steps": chain.source(_flags(chain, by_row)),
        "leading": chain.leading,
        "nonlinear": chain.slopes_vary,
        "operands": tuple((o.index, o.kind, o.index in chain.conditions) for o in chain.operands),
        "by_row": by_row,
    }


@lru_cache(maxsize=256)
def _row_parameters(
    chain: Epilogue, by_class: tuple[int, ...], keeps_label: bool, bias_gradient: bool
) -> Mapping[str, Parameter]:
    steps = chain.source(_flags(chain, by_class))[: chain.leading]
    read = {operand for step in chain.steps[: chain.leading] for operand, _ in step.tensors()}
    factors = tuple((o.index, o.kind, False) for o in chain.operands if o in read and o.kind != "class")
    return {
        "row_operands": tuple(o.index for o in chain.operands if o.kind == "row"),
        "keeps_label": keeps_label,
        "leading_steps": steps,
        "leading_operands": factors,
        "by_class": by_class,
        "bias_gradient": bias_gradient,
    }


def _flags(chain: Epilogue, indices: tuple[int, ...]) -> list[bool]:
    """Whether each index that an operand may have is among these."""
    return [index in indices for index in range(1 + max((o.index for o in chain.operands), default=-1))]


@lru_cache(maxsize=16)
def _module(sums: int, weighted: bool) -> Any:
    return load(render("linear_cross_entropy_column_sums", sums=sums, weighted=weighted, all_rows=not weighted))

"""The head in chunks of exponentials: no pass over the logits between the products, on GPUs in bfloat16.

With e = exp(u - r) in bfloat16 and row sums s, of :mod:`~structfly.lowering.linear_cross_entropy.row_pass`, p = e / s
and the target's entry put right, the gradients are plain products of e:

    dz_nv = c_n f'_nv (p_nv - [v = t_n]) = factor_n E_nv
    E_nv = f'_nv (e_nv - [v = t_n] s_n),    factor_n = c_n / s_n
    dx = factor (E W),    dW = E^T (factor x)

and nothing but the target's entries is ever read or written elementwise.  What f' has in common for all classes of a
row stands in the factor instead.  Gradients of the bias and of f's operands:
:mod:`~structfly.lowering.linear_cross_entropy.chain_operands`.

A target's entry can be far larger than the rest of its row.  What its rounding to bfloat16 leaves out is added to dx
where the factor is multiplied in, as factor (entry - bfloat16(entry)) W_t, and to dW by
:mod:`~structfly.lowering.linear_cross_entropy.weight_sum`.  Label smoothing's term is an outer product, which goes into
the gradients' epilogues as one: :mod:`~structfly.lowering.linear_cross_entropy.smoothing`.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from structfly.lowering.gemm import TORCH_MM, Blocks, Cut, LibraryProduct, Product, best_split, programs_on
from structfly.lowering.head.linear import Gradients, Wanted, allocate_gradients
from structfly.lowering.launch import Launch, on_device
from structfly.lowering.linear_cross_entropy.chunked import Head
from structfly.lowering.linear_cross_entropy.pass_records import LateCoefficients
from structfly.lowering.linear_cross_entropy.row_pass import RowPass, tiles_of
from structfly.lowering.linear_cross_entropy.schedule import exponential_rows
from structfly.lowering.linear_cross_entropy.smoothing import weighted_rows
from structfly.lowering.linear_cross_entropy.weight_sum import WeightSum
from structfly.lowering.side_stream import SideStream
from structfly.lowering.template import load, render


def run_exponentials(
    head: Head, coefficients: LateCoefficients, wanted: Wanted | None, workspace: int
) -> tuple[Tensor, Gradients | None]:
    """Losses of all rows and, where ``wanted`` is given, gradients of ``sum_n coefficient_n loss_n``, for heads that
    :func:`~structfly.lowering.linear_cross_entropy.schedule.why_no_exponentials` has nothing against.

    Args:
        workspace: bytes that the exponentials of one chunk may take.

    Returns:
        (N,) float32 losses, and the gradients.
    """
    rows = len(head.x)
    if not rows:
        gradients = None if wanted is None else allocate_gradients(head, wanted)
        if gradients is not None:
            for gradient in gradients.each:
                gradient.zero_()
        return head.x.new_zeros(0, dtype=torch.float32), gradients
    length = exponential_rows(rows, head.num_classes, workspace)
    with on_device(head.x.device):
        keeps: Literal["", "exponentials"] = "" if wanted is None else "exponentials"
        width = head.x.shape[1] if wanted is not None and wanted.x else 0
        each = RowPass(head, coefficients, length, keeps, tiles_of(head), sums_width=width, wanted=wanted)
        gradients = None
        if wanted is None:
            each.do_all()
        else:
            gradients = ExponentialRun(each, wanted).gradients()
        each.check_targets()
    return each.losses, gradients


class ExponentialRun:
    """The products of each chunk's exponentials, and the loop over chunks."""

    def __init__(self, each: RowPass, wanted: Wanted) -> None:
        self.each, self.wanted = each, wanted
        self.device, self.hidden = each.x.device, each.x.shape[1]

    def gradients(self) -> Gradients:
        """Make them, and the losses."""
        each, live = self.each, self.each.rows.count
        beside = SideStream(self.device, used=self.wanted.x and self.wanted.weight)
        for number, start in enumerate(each.starts):
            each.do(start)
            _ = self.outer  # which the other stream reads
            beside.fork()
            if self.wanted.weight and number:  # short programs, which leave before the products' have all begun
                with beside:
                    self.weight_sum.add_targets(start)
            if self.wanted.x:  # first, for its tiles are few and long: the other product fills their gaps
                if self.split > 1:
                    self.hidden_sums.zero_()
                self.hidden_product(live, start)
                self.scatter(live, start)
            if self.wanted.weight:
                weight = self.weight_sum
                with beside:
                    weight.add_product(start)
                if not number:
                    weight.sort_targets()
            if each.operands.sums_over_rows:  # of what the products read, too: where they leave room, beside them
                self.column_sums(live, start)
            beside.join()
            if self.wanted.weight and not number:
                self.weight_sum.add_targets(start)
        if self.wanted.weight:
            self.weight_sum.close(len(each.starts))
        each.operands.finish(self.made, self._smoothed_bias())
        return self.made

    @cached_property
    def made(self) -> Gradients:
        return allocate_gradients(self.each.head, self.wanted)

    @property
    def hidden_cut(self) -> Cut:
        tiles = self.each.tiles
        return tiles.hidden_product_of_all if self.each.every_row else tiles.hidden_product

    @cached_property
    def split(self) -> int:
        cut = self.hidden_cut
        return 1 if cut == TORCH_MM else best_split(self.each.length, self.hidden, programs_on(self.device, cut), cut)

    @cached_property
    def hidden_sums(self) -> Tensor:
        return self.each.sums[: self.each.length * self.hidden].view(self.each.length, self.hidden)

    @cached_property
    def hidden_product(self) -> Product | LibraryProduct:
        each, cut = self.each, self.hidden_cut
        if cut == TORCH_MM:
            return LibraryProduct(each.chunk.exps, each.weight, self.hidden_sums)
        return Product(
            "linear_cross_entropy_hidden",
            each.chunk.exps,
            each.weight,
            [Blocks(self.hidden_sums)],
            tiles=cut,
            split=self.split,
        )

    @cached_property
    def scatter(self) -> Launch:
        each, dx = self.each, self.made.x
        dx.zero_()  # rows that do not count are never written
        module = _scatter_module(uniform=each.constant_slope * each.share, interpreted=not each.x.is_cuda)
        return Launch(
            module.scatter,
            (each.length,),
            each.per_row,
            [
                *(each.rows.index, each.head.target, each.weight, *each.weight.stride()),
                *(each.coefficient, each.weighted_classes, each.chunk.factor, each.chunk.entry),
                *(self.hidden_sums, dx, *dx.stride()),
            ],
        )

    @cached_property
    def column_sums(self) -> Launch:
        each = self.each
        return each.operands.column_sums(each.chunk.exps, each.chunk.entry)

    @cached_property
    def outer(self) -> tuple[Tensor, Tensor] | None:
        """What label smoothing takes off dW, as an outer product."""
        each = self.each
        if not each.share or not self.wanted.weight:
            return None
        return self._class_weights, weighted_rows(each.x, self._counts) * (each.constant_slope * each.share)

    def _smoothed_bias(self) -> Tensor | None:
        """What it takes off the bias's gradient."""
        each = self.each
        if not each.share or not self.wanted.bias:
            return None
        return (
            self._class_weights * (self._counts.sum(dtype=torch.float64) * (each.constant_slope * each.share)).float()
        )

    @cached_property
    def _counts(self) -> Tensor:
        """(N,) coefficients of the rows that count, else 0."""
        each, head = self.each, self.each.head
        if head.ignore_index is None:
            return each.coefficient
        return each.coefficient * (head.target != head.ignore_index)

    @property
    def _class_weights(self) -> Tensor:
        """(C,) of ones where there are none."""
        weights = self.each.terms.weight
        return self._counts.new_ones(self.each.head.num_classes) if weights is None else weights

    @cached_property
    def weight_sum(self) -> WeightSum:
        each, dw, classes = self.each, self.made.weight, self.each.head.num_classes
        dw[classes:].zero_()
        beside = self.hidden_product if self.wanted.x else None
        return WeightSum(dw[:classes], each.x, each.chunk, each.rows, self.outer, beside, each.tiles.weight_sum)


@lru_cache(maxsize=64)
def _scatter_module(*, uniform: float, interpreted: bool) -> Any:
    return load(render("linear_cross_entropy_scatter", uniform=uniform, interpreted=interpreted))

"""The head in chunks of exponentials: no pass over the logits between the products, on GPUs in bfloat16.

bfloat16 has float32's exponents.  So a product's epilogue can turn its float32 sums into e = exp(u - r) and store that
at once, with any row reference r that keeps e in range; row sums s come out of the same epilogue.  With p = e / s and
the target's entry put right, the gradients are plain products of e:

    dz_nv = c_n f'_nv (p_nv - [v = t_n]) = factor_n E_nv
    E_nv = f'_nv (e_nv - [v = t_n] s_n),    factor_n = c_n / s_n
    dx = factor (E W),    dW = E^T (factor x)

and nothing but the target's entries is ever read or written elementwise.  r is the larger of the target's u and the
largest of a few sampled classes': a lower bound of the row's maximum, so that s is no less than about 1.  A chunk in
which e overflows all the same is done again with r = the largest u, which costs it two further products and no
synchronisation with the host: the launches are always made and find nothing to do.

Rows that do not count (ignored, or of coefficient 0) are left out: the rows that do are gathered one after another, and
the kernels read on the device how many there are.

A target's entry can be far larger than the rest of its row.  What its rounding to bfloat16 leaves out is added to dx
where the factor is multiplied in, as factor (entry - bfloat16(entry)) W_t, and to dW by
:mod:`~structfly.lowering.linear_cross_entropy.weight_sum`.  Label smoothing's term is an outer product, which goes into
the gradients' epilogues as one: :mod:`~structfly.lowering.linear_cross_entropy.smoothing`.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from structfly.compat import assert_on_device
from structfly.lowering.gemm import Blocks, Product, best_split, has_descriptor, programs_on, tiles_for
from structfly.lowering.head.chunks import row_stride
from structfly.lowering.head.linear import Gradients, Wanted, allocate_gradients
from structfly.lowering.launch import Launch
from structfly.lowering.linear_cross_entropy.chunked import Head, class_terms
from structfly.lowering.linear_cross_entropy.live_rows import LiveRows
from structfly.lowering.linear_cross_entropy.rows import ClassTerms
from structfly.lowering.linear_cross_entropy.schedule import exponential_rows
from structfly.lowering.linear_cross_entropy.smoothing import weighted_classes, weighted_rows
from structfly.lowering.linear_cross_entropy.weight_sum import ChunkRows, WeightSum
from structfly.lowering.side_stream import SideStream
from structfly.lowering.template import Parameter, load, render

_SAMPLED_CLASSES = 8
_HIDDEN_BLOCK = 1024
_GROUP = 32  # rows of tiles of the logits that are taken together: most often all of a chunk's


def run_exponentials(
    head: Head, coefficient: Tensor | None, wanted: Wanted | None, workspace: int
) -> tuple[Tensor, Gradients | None]:
    """Losses of all rows and, where ``wanted`` is given, gradients of ``sum_n coefficient_n loss_n``, for heads that
    :func:`~structfly.lowering.linear_cross_entropy.schedule.why_no_exponentials` has nothing against.

    Args:
        coefficient: (N,) float32, or None for ones.
        workspace: bytes that the exponentials of one chunk may take.

    Returns:
        (N,) float32 losses, and the gradients.
    """
    losses = head.x.new_zeros(head.x.shape[0], dtype=torch.float32)
    gradients = None if wanted is None else allocate_gradients(head, wanted)
    if len(losses):
        with torch.cuda.device(head.x.device) if head.x.is_cuda else nullcontext():
            _Run(head, coefficient, gradients, workspace, losses).run()
    elif gradients is not None:
        gradients.weight.zero_()
    return losses, gradients


class _Run:
    """Buffers that every chunk fills anew, the kernels over them, and the loop over chunks.

    Kernels are made ready when they are first needed, while the device is busy with those before.
    """

    def __init__(
        self, head: Head, coefficient: Tensor | None, gradients: Gradients | None, workspace: int, losses: Tensor
    ) -> None:
        self.head, self.coefficient, self.losses = head, coefficient, losses
        self.gradient = gradients is not None
        self.dx = gradients.x if gradients is not None and gradients.x.numel() else None
        self.dw = gradients.weight if gradients is not None and gradients.weight.numel() else None
        self.terms, self.live_classes = _apart(class_terms(head))
        self.share = head.label_smoothing / head.num_classes
        self.x = head.x if head.x.stride(1) == 1 else head.x.contiguous()
        self.weight = head.weight[: head.num_classes]
        if not has_descriptor(self.weight):  # a view of a larger buffer that begins anywhere
            self.weight = self.weight.clone(memory_format=torch.contiguous_format)
        rows, self.hidden = head.x.shape
        self.length = exponential_rows(rows, head.num_classes, workspace)
        self.starts = range(0, rows, self.length)
        self.rows = LiveRows(head, coefficient, self.length)
        self.split = 1
        if self.dx is not None:
            self.split = best_split(self.length, self.hidden, programs_on(self.x.device), tiles_for(self.x.device))
        self._make_buffers()

    def run(self) -> None:
        beside = SideStream(self.x.device, used=self.dx is not None and self.dw is not None)
        for number, start in enumerate(self.starts):
            self._exponentials(start, self.overflowed[number])
            weight, live = self.weight_sum, self.rows.count
            if weight is not None and number:
                weight.add_targets(start)
            beside.fork()
            if self.dx is not None:  # first, for its tiles are few and long: the other product fills their gaps
                self.hidden_product(live, start)
                self.scatter(live, start)
            if weight is not None:
                with beside:
                    weight.add_product(start)
            beside.join()
            if weight is not None and not number:
                weight.add_targets(start)
        if weight is not None:
            weight.close(len(self.starts))
        if self.x.is_cuda:
            classes = self.head.num_classes
            assert_on_device(self.rows.wrong == 0, f"a target is out of bounds for {classes} classes")

    def _exponentials(self, start: int, overflowed: Tensor) -> None:
        """Exponentials, losses and factors of the rows from ``start`` on."""
        live = self.rows.count
        self.gather(live, start)
        self.exponentials(live, start, overflowed)
        # Once more with the largest logits, if some were too large; else these launches find no rows.
        self.largest(overflowed, start, overflowed)
        self.exponentials(overflowed, start, overflowed)
        self.finish(live, start)

    # ------------------------------------------------------------------------------------------------ preparation

    def _make_buffers(self) -> None:
        classes, device = self.head.num_classes, self.x.device
        self.tiles = -(-classes // tiles_for(device).n)
        self.tile_sums = torch.empty(self.length, self.tiles, device=device)
        vectors = torch.empty(6, self.length, device=device).unbind()
        self.u_target, self.slope_target, self.u_sum, self.reference, factor, entry = vectors
        exps = self.x.new_empty((self.length, row_stride(classes)) if self.gradient else (1, 16))[:, :classes]
        self.chunk = ChunkRows(exps, self.x.new_empty(self.length, self.hidden), factor, entry)
        self.hidden_sums = self.unused = factor
        if self.dx is not None:
            self.hidden_sums = torch.empty(self.length, self.hidden, device=device)
        self.weighted_classes = self.weighted_bias = self.class_weight_sum = self.unused
        if self.share:
            class_weight = self.terms.weight
            self.weighted_classes, self.weighted_bias = weighted_classes(self.weight, self.terms.bias, class_weight)
            sum_of_ones = factor.new_full((), float(classes))
            self.class_weight_sum = sum_of_ones if self.terms.weight_sum is None else self.terms.weight_sum
        self.overflowed = torch.zeros(len(self.starts), dtype=torch.int32, device=device)
        self.bias = self._given(self.terms.bias)
        self.mask = self.unused if self.live_classes is None else self.live_classes.contiguous().view(torch.uint8)
        self.per_row = {"HIDDEN": self.hidden, "BLOCK": min(_HIDDEN_BLOCK, _power_of_two(self.hidden))}

    def _given(self, tensor: Tensor | None) -> Tensor:
        """The tensor, or for None one that the kernel does not read."""
        return self.unused if tensor is None else tensor.contiguous()

    @cached_property
    def chain(self) -> dict[str, Parameter]:
        """What the kernels that see logits are generated from."""
        return {
            "steps": self.terms.epilogue.source(),
            "nonlinear": not self.terms.epilogue.linear,
            "has_bias": self.terms.bias is not None,
            "has_mask": self.live_classes is not None,
            "gradient": self.gradient,
        }

    @cached_property
    def row_kernels(self) -> Any:
        rows: dict[str, Parameter] = {
            "constant_slope": _constant_slope(self.terms),
            "class_weight": self.terms.weight is not None,
            "coefficient": self.coefficient is not None,
            "clear": self.split > 1,
            "smoothing": self.head.label_smoothing,
            "share": self.share,
            "interpreted": not self.x.is_cuda,
        }
        return _row_module(tuple({**self.chain, **rows}.items()))

    @cached_property
    def gather(self) -> Launch:
        return Launch(
            self.row_kernels.gather,
            (self.length,),
            {"CLASSES": self.head.num_classes, "SAMPLES": _SAMPLED_CLASSES, **self.per_row},
            [
                *(self.rows.index, self.head.target, self.x, self.x.stride(0), self.weight, *self.weight.stride()),
                *(self.bias, self.mask, self.weighted_classes, self.weighted_bias),
                *(self.chunk.factor_x, self.u_target, self.slope_target, self.u_sum, self.reference),
            ],
        )

    @cached_property
    def exponentials(self) -> Product:
        return self._logits_product(largest=False)

    @cached_property
    def largest(self) -> Product:
        return self._logits_product(largest=True)

    def _logits_product(self, *, largest: bool) -> Product:
        exps = Blocks(self.chunk.exps, cut=False) if self.gradient else self.unused
        return Product(
            "linear_cross_entropy_exponentials",
            self.chunk.factor_x,
            self.weight.t(),
            [self.reference, self.tile_sums, self.tiles, exps, self.bias, self.mask],
            {**self.chain, "largest": largest},
            tiles=replace(tiles_for(self.x.device), group=_GROUP),
        )

    @cached_property
    def finish(self) -> Launch:
        chunk = self.chunk
        return Launch(
            self.row_kernels.finish,
            (self.length,),
            {"TILES": self.tiles, "TILE_BLOCK": _power_of_two(self.tiles), **self.per_row},
            [
                *(self.rows.index, self.head.target, self._given(self.coefficient), self._given(self.terms.weight)),
                *(self.class_weight_sum, self.tile_sums, self.reference),
                *(self.u_target, self.slope_target, self.u_sum, self.losses),
                *(chunk.exps, chunk.exps.stride(0), chunk.factor_x, chunk.factor, chunk.entry, self.hidden_sums),
            ],
        )

    @cached_property
    def hidden_product(self) -> Product:
        sums = [Blocks(self.hidden_sums)]
        return Product("linear_cross_entropy_hidden", self.chunk.exps, self.weight, sums, split=self.split)

    @cached_property
    def scatter(self) -> Launch:
        assert self.dx is not None
        self.dx.zero_()  # rows that do not count are never written
        return Launch(
            self.row_kernels.scatter,
            (self.length,),
            self.per_row,
            [
                *(self.rows.index, self.head.target, self.weight, *self.weight.stride()),
                *(self._given(self.coefficient), self.weighted_classes, self.chunk.factor, self.chunk.entry),
                *(self.hidden_sums, self.dx, self.dx.stride(0)),
            ],
        )

    @cached_property
    def weight_sum(self) -> WeightSum | None:
        if self.dw is None:
            return None
        classes, outer = self.head.num_classes, None
        self.dw[classes:].zero_()
        if self.share:
            counts = torch.ones_like(self.losses) if self.coefficient is None else self.coefficient
            if self.head.ignore_index is not None:
                counts = counts * (self.head.target != self.head.ignore_index)
            uniform = weighted_rows(self.x, counts) * (_constant_slope(self.terms) * self.share)
            weights = self.terms.weight
            outer = (uniform.new_ones(classes) if weights is None else weights, uniform)
        beside = None if self.dx is None else self.hidden_product
        return WeightSum(self.dw[:classes], self.x, self.chunk, self.rows, outer, beside)


@lru_cache(maxsize=256)
def _row_module(parameters: tuple[tuple[str, Parameter], ...]) -> Any:
    return load(render("linear_cross_entropy_exponential_rows", **dict(parameters)))


def _constant_slope(terms: ClassTerms) -> float:
    """f' where it is a number; where it is not, it stands in the exponentials."""
    return terms.epilogue.scale if terms.epilogue.linear else 1.0


def _apart(terms: ClassTerms) -> tuple[ClassTerms, Tensor | None]:
    """The terms without the steps that set classes to -inf at the end, and which classes those leave, None for all."""
    epilogue, steps = terms.epilogue.without_dead_classes()
    mask: Tensor | None = None
    for step in steps:
        ((condition, _),) = step.tensors()
        flags = terms.operands[condition.index]
        flags = ~flags if step.name == "masked_fill" else flags
        mask = flags if mask is None else mask & flags
    return replace(terms, epilogue=epilogue, operands=(), operand_gradients=()), mask


def _power_of_two(size: int) -> int:
    return 1 << max(size - 1, 1).bit_length()

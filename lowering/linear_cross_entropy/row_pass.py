"""Chunks of exponentials: each row's loss, and what its gradient needs.

bfloat16 has float32's exponents.  So a product's epilogue can turn its float32 sums into e = exp(u - r) and, where
they are kept, store that at once, with any row reference r that keeps e in range; row sums s come out of the same
epilogue.  r is the larger of the target's u and the largest of a few sampled classes': a lower bound of the row's
maximum, so that s is no less than about 1.  A chunk in which e overflows all the same is done again with r = the
largest u, which costs it two further products and no synchronisation with the host: the launches are always made and
find nothing to do.

Rows that do not count (ignored, or of coefficient 0) are left out: the rows that do are gathered one after another, and
the kernels read on the device how many there are.

The host is ahead of the device from the first product on, and only from there.  So what that product does not need is
made after it is launched.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from structfly.compat import assert_on_device
from structfly.lowering.device_profile import device_model
from structfly.lowering.gemm import Blocks, Product, Tiles, is_operand
from structfly.lowering.head.chunks import row_stride
from structfly.lowering.head.linear import Wanted
from structfly.lowering.launch import Launch
from structfly.lowering.linear_cross_entropy.buffers import in_one_buffer
from structfly.lowering.linear_cross_entropy.chain_operands import ChainOperands
from structfly.lowering.linear_cross_entropy.chunked import Head, class_terms
from structfly.lowering.linear_cross_entropy.live_rows import LiveRows
from structfly.lowering.linear_cross_entropy.pass_records import ChunkRows, KeptRows, LateCoefficients
from structfly.lowering.linear_cross_entropy.rows import ClassTerms
from structfly.lowering.linear_cross_entropy.smoothing import weighted_classes
from structfly.lowering.linear_cross_entropy.tiles import HeadTiles, head_class, head_tiles
from structfly.lowering.template import Parameter, load, render

_SAMPLED_CLASSES = 8
_HIDDEN_BLOCK = 1024


class RowPass:
    """Buffers that every chunk fills anew, and the kernels over them.

    Args:
        coefficients: of the rows.
        length: rows of a chunk.
        keeps: "" for the losses alone, "exponentials" for :class:`ChunkRows`, "rows" for :class:`KeptRows`.
        tiles: of the head's products.
        sums_width: what ``sums`` has for each row of a chunk, at least.
        wanted: which gradients will be.

    Attributes:
        operands: of the pointwise chain.
        sums: float32 numbers for each row of a chunk, free from one chunk's losses to the next one's logits.
        rows: the rows that count.
        every_row: whether none can be left out.
        losses: (N,) float32, 0 where a row does not count.
    """

    def __init__(
        self,
        head: Head,
        coefficients: LateCoefficients,
        length: int,
        keeps: Literal["", "exponentials", "rows"],
        tiles: HeadTiles,
        sums_width: int = 0,
        wanted: Wanted | None = None,
    ) -> None:
        self.head, self.length, self.keeps, self.tiles = head, length, keeps, tiles
        self._coefficients = coefficients
        self.every_row = head.ignore_index is None and coefficients.chosen is None
        self.x = head.x if head.x.stride(1) == 1 else head.x.contiguous()
        self.weight = head.weight if len(head.weight) == head.num_classes else head.weight[: head.num_classes]
        if not is_operand(self.weight):  # a view of a larger buffer that begins anywhere
            self.weight = self.weight.clone(memory_format=torch.contiguous_format)
        wanted = wanted or Wanted()
        self.terms, live_classes = _apart(class_terms(head, wanted.operands))
        self.share = head.label_smoothing / head.num_classes
        self.starts = range(0, head.x.shape[0], length)
        self.operands = ChainOperands(self.terms, bias_gradient=wanted.bias, classes=head.num_classes)
        self._make_buffers(live_classes, sums_width)

    def do_all(self) -> None:
        """Do all rows, where nothing is to be done between chunks."""
        for start in self.starts:
            self.do(start)

    def do(self, start: int) -> None:
        """Do the chunk from ``start`` on."""
        live, overflowed = self.rows.count, self.rows.zeros[start // self.length]
        self.gather(live, start)
        self.exponentials(live, start, overflowed)
        # Once more with the largest logits, if some were too large; else these launches find no rows.
        self.largest(overflowed, start, overflowed)
        self.exponentials(overflowed, start, overflowed)
        self.finish(live, start)

    def check_targets(self) -> None:
        """Fail the CUDA program if a target that is not ignored was no class."""
        if self.x.is_cuda:
            message = f"a target is out of bounds for {self.head.num_classes} classes"
            assert_on_device(self.rows.wrong == 0, message)

    def release(self) -> None:
        """Let go of what only the pass itself needs."""
        for name in ("gather", "exponentials", "largest", "finish", "sums", "chunk"):
            self.__dict__.pop(name, None)

    def _make_buffers(self, live_classes: Tensor | None, sums_width: int) -> None:
        classes, hidden, device = self.head.num_classes, self.x.shape[1], self.x.device
        self.rows = LiveRows(self.head, self._coefficients.chosen, self.length, apart=self.keeps == "exponentials")
        self.across = -(-classes // self.logits_tiles.n)
        tiles = self.across * (1 + len(self.operands.by_row))
        stored = (self.length, row_stride(classes)) if self.keeps == "exponentials" else (1, 16)
        exps, factor_x, self.sums = in_one_buffer(
            device,
            (stored, torch.bfloat16),
            ((self.length, hidden), torch.bfloat16),
            ((self.length * max(tiles, sums_width),), torch.float32),
        )
        counts = (6, self.operands.vectors)
        vectors = torch.empty(sum(counts), self.length, device=device)  # apart, for they live longer
        own, of_operands = vectors.split_with_sizes(counts)
        self.u_target, self.slope_target, self.u_sum, self.reference, factor, entry = own.unbind()
        self.operands.allocate(of_operands, self.rows)
        self.chunk = ChunkRows(exps[:, :classes], factor_x, factor, entry)
        self.unused = factor
        self.weighted_classes = self.weighted_bias = self.class_weight_sum = self.unused
        if self.share:
            class_weight = self.terms.weight
            self.weighted_classes, self.weighted_bias = weighted_classes(self.weight, self.terms.bias, class_weight)
            sum_of_ones = factor.new_full((), float(classes))
            self.class_weight_sum = sum_of_ones if self.terms.weight_sum is None else self.terms.weight_sum
        self.bias = self.given(self.terms.bias)
        self.mask = self.unused if live_classes is None else live_classes.contiguous().view(torch.uint8)
        self.chain: dict[str, Parameter] = {
            **self.operands.parameters,
            "has_bias": self.terms.bias is not None,
            "has_mask": live_classes is not None,
        }
        self.per_row = {"HIDDEN": hidden, "BLOCK": min(_HIDDEN_BLOCK, power_of_two(hidden))}

    def given(self, tensor: Tensor | None) -> Tensor:
        """The tensor, or for None one that the kernel does not read."""
        return self.unused if tensor is None else tensor.contiguous()

    @property
    def tile_moments(self) -> Tensor:
        """Of each row and tile, what stands behind the sums of exponentials."""
        return self.sums[self.length * self.across :]

    @cached_property
    def coefficient(self) -> Tensor:
        return self._coefficients.make(self.rows.count)

    @cached_property
    def losses(self) -> Tensor:
        return self.x.new_zeros(len(self.x), dtype=torch.float32)

    @cached_property
    def statistics(self) -> KeptRows:
        """Filled where ``keeps`` is "rows"."""
        rows = len(self.x)
        lse, factor, entry, uniform = torch.empty(4, rows, device=self.x.device).unbind()
        return KeptRows(lse, factor, entry, uniform, self.rows.index.new_empty(rows))

    @property
    def logits_tiles(self) -> Tiles:
        """Of the products that make the logits."""
        return self.tiles.exponentials if self.keeps == "exponentials" else self.tiles.losses

    @property
    def constant_slope(self) -> float:
        """f' where it is a number, as it is with label smoothing; else 1."""
        return self.terms.epilogue.scale if self.terms.epilogue.linear else 1.0

    # --------------------------------------------------------------------------------------------------- kernels

    @cached_property
    def row_kernels(self) -> Any:
        rows: dict[str, Parameter] = {
            **self.operands.row_parameters,
            "keeps": self.keeps,
            "constant_slope": self.constant_slope,
            "class_weight": self.terms.weight is not None,
            "smoothing": self.head.label_smoothing,
            "share": self.share,
            "interpreted": not self.x.is_cuda,
        }
        return _row_module(tuple({**self.chain, **rows}.items()))

    @cached_property
    def gather(self) -> Launch:
        apart = max(1, self.head.num_classes // _SAMPLED_CLASSES)
        sampled = self.weight[: apart * _SAMPLED_CLASSES : apart]
        if sampled.stride(1) != 1:  # every row reads them
            sampled = sampled.contiguous()
        return Launch(
            self.row_kernels.gather,
            (self.length,),
            {"SAMPLES": len(sampled), "APART": apart, **self.per_row},
            [
                *(self.rows.index, self.head.target, self.x, self.x.stride(0), self.weight, *self.weight.stride()),
                *(sampled, sampled.stride(0), self.bias, self.mask, self.weighted_classes, self.weighted_bias),
                *self.operands.pointers,
                *(self.chunk.factor_x, self.u_target, self.slope_target, self.u_sum, self.reference),
                *(self.operands.row_values, self.operands.at_target, self.operands.label),
            ],
        )

    @cached_property
    def exponentials(self) -> Product:
        return self._logits_product(largest=False)

    @cached_property
    def largest(self) -> Product:
        return self._logits_product(largest=True)

    def _logits_product(self, *, largest: bool) -> Product:
        stored, operands = self.keeps == "exponentials", self.operands
        exps = Blocks(self.chunk.exps, cut=False) if stored else self.unused
        of_moments = (operands.label, operands.at_target, self.tile_moments, self.length) if operands.by_row else ()
        # The slopes of rows that are not there: of hidden states 0, and of any operands.
        guarded = bool(operands.pointers) or not self.terms.epilogue.has_steepest
        return Product(
            "linear_cross_entropy_exponentials",
            self.chunk.factor_x,
            self.weight.t(),
            [
                *(self.reference, self.sums, self.across, exps, self.bias, self.mask, *operands.chunk_pointers),
                *of_moments,
            ],
            {**self.chain, "guarded": guarded, "stored": stored, "largest": largest},
            tiles=self.logits_tiles,
        )

    @cached_property
    def finish(self) -> Launch:
        chunk, kept = self.chunk, self.statistics if self.keeps == "rows" else None
        factor, entry = (chunk.factor, chunk.entry) if kept is None else (kept.factor, kept.entry)
        operands = self.operands
        others = (self.unused, self.unused, self.rows.index) if kept is None else (kept.lse, kept.uniform, kept.label)
        return Launch(
            self.row_kernels.finish,
            (self.length,),
            {"TILES": self.across, "TILE_BLOCK": power_of_two(self.across), **self.per_row},
            [
                *(self.rows.index, self.head.target, self.coefficient, self.given(self.terms.weight)),
                *(self.class_weight_sum, self.sums, self.reference),
                *(self.u_target, self.slope_target, self.u_sum, self.losses, *operands.pointers),
                *(self.tile_moments, operands.row_sums, len(self.x)),
                *(chunk.exps, chunk.exps.stride(0), chunk.factor_x, factor, entry, operands.weights, *others),
            ],
        )


@lru_cache(maxsize=256)
def _row_module(parameters: tuple[tuple[str, Parameter], ...]) -> Any:
    return load(render("linear_cross_entropy_exponential_rows", **dict(parameters)))


def _apart(terms: ClassTerms) -> tuple[ClassTerms, Tensor | None]:
    """The terms without the steps that set classes to -inf at the end, and which classes those leave, None for all."""
    epilogue, steps = terms.epilogue.without_dead_classes
    if not steps:
        return terms, None
    mask: Tensor | None = None
    for step in steps:
        ((condition, _),) = step.tensors()
        flags = terms.operands[condition.index]
        flags = ~flags if step.name == "masked_fill" else flags
        mask = flags if mask is None else mask & flags
    return replace(terms, epilogue=epilogue), mask


def tiles_of(head: Head) -> HeadTiles:
    """The tiles of a head's products."""
    classes, hidden = head.weight.shape
    return head_tiles(
        head_class(
            device_model(head.x.device),
            hidden=hidden,
            classes=head.num_classes,
            weight_row=hidden if head.weight.stride(1) == 1 else classes,
            nonlinear=head.epilogue.without_dead_classes[0].slopes_vary,
        )
    )


def power_of_two(size: int) -> int:
    """The least power of two that is no less, at least 2."""
    return 1 << max(size - 1, 1).bit_length()

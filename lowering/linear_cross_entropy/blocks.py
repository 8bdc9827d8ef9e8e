"""The head in blocks of rows and classes: little memory for a product more, on GPUs in bfloat16.

A first pass over the logits, which are not stored, gives every row's loss and log-sum-exp.  Then each block of the
logits is made again, this time with dz = c f' (p - [v = t]) in the product's epilogue, and goes into two sums,

    dx += dz W,    dW += dz^T x,

8NHC operations in all.  Blocks of the same classes follow one another, so that what the sums hold beside the gradients
themselves (:mod:`~structfly.lowering.linear_cross_entropy.sums` says what) is of these classes alone for dW, and
of all rows for dx.  The idea of making the logits twice and never storing a row of them is that of Cut Cross-Entropy
(Wijmans et al. 2024); here nothing is filtered and no sum depends on an order.

A target's entry can be far larger than the rest of its row.  What its rounding to bfloat16 leaves out is what both sums
begin with.

Rows that count are gathered one after another.  Their hidden states lie so in the part of dW whose classes come last,
until those come; from then on they are taken a chunk at a time.  dx is summed in that order too: at the end its rows
are spread to where they belong, from the last to the first, so that none is overwritten before it has moved.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from structfly.lowering.gemm import IDLE, Blocks, Product, processors_of
from structfly.lowering.head.linear import Gradients, Wanted, allocate_gradients
from structfly.lowering.launch import Launch, on_device
from structfly.lowering.linear_cross_entropy.chunked import Head
from structfly.lowering.linear_cross_entropy.pass_records import LateCoefficients
from structfly.lowering.linear_cross_entropy.row_pass import RowPass, power_of_two, tiles_of
from structfly.lowering.linear_cross_entropy.schedule import BlockSizes, bias_sum_bytes, block_sizes, low_stride
from structfly.lowering.linear_cross_entropy.sums import new_plane, sum_product
from structfly.lowering.side_stream import SideStream
from structfly.lowering.template import load, render

_COLUMNS, _ROWS = 1024, 4  # of a class, that a program takes at a time


def run_blocks(
    head: Head, coefficients: LateCoefficients, wanted: Wanted | None, workspace: int
) -> tuple[Tensor, Gradients | None]:
    """Fulfils the contract of :func:`~structfly.lowering.linear_cross_entropy.exponentials.run_exponentials`;
    ``workspace`` are the bytes of all that is taken besides inputs and gradients."""
    rows, hidden = head.x.shape
    if not rows:
        return head.x.new_zeros(0, dtype=torch.float32), None if wanted is None else _zeros(head, wanted)
    device = head.x.device
    tiles = tiles_of(head)
    limit = workspace - bias_sum_bytes(head.num_classes, bias=wanted is not None and wanted.bias)
    sizes = block_sizes(rows, hidden, head.num_classes, limit, processors=processors_of(device), tiles=tiles)
    with on_device(device):
        each = RowPass(head, coefficients, sizes.rows, "" if wanted is None else "rows", tiles, wanted=wanted)
        each.do_all()
        gradients = None
        if wanted is not None:
            gradients = _zeros(head, wanted)
            BlockRun(each, wanted, gradients, sizes).run()
            each.operands.finish(gradients, None)
        each.check_targets()
    return each.losses, gradients


def _zeros(head: Head, wanted: Wanted) -> Gradients:
    """Gradients that are zero, but for the weight's where there are blocks."""
    gradients = allocate_gradients(head, wanted)
    gradients.x.zero_()
    gradients.bias.zero_()
    gradients.weight[head.num_classes if len(head.x) else 0 :].zero_()
    return gradients


class BlockRun:
    """The blocks' buffers and products, and the loops over them."""

    def __init__(self, each: RowPass, wanted: Wanted, gradients: Gradients, sizes: BlockSizes) -> None:
        self.each, self.wanted, self.sizes, self.device = each, wanted, sizes, each.x.device
        self.tiles = each.tiles
        self.rows, self.of_rows = each.rows, each.statistics
        self.dx, self.dw, self.out = gradients.x, gradients.weight, gradients.x
        if wanted.x and self.dx.stride(1) != 1:  # the products write whole rows
            self.dx = torch.zeros_like(self.dx, memory_format=torch.contiguous_format)
        self.hidden, self.classes = each.x.shape[1], each.head.num_classes
        each.release()
        chunk = sizes.rows * self.hidden
        needed = max(self._needed(sizes.rows, sizes.classes), chunk + self._needed(sizes.rows, sizes.beside))
        self.buffer = each.x.new_empty(needed)
        self.chunk = self.buffer[:chunk].view(sizes.rows, self.hidden)

    def run(self) -> None:
        if self.wanted.x:
            self.begin_hidden(self.rows.count)
        done = 0
        if self.wanted.weight and self.dw.stride(1) == 1:
            done = self._add_beside_last_classes()
        self._add(range(done, self.classes, self.sizes.beside), self.sizes.rows, self.chunk)
        if self.wanted.x:
            self._spread()

    def _add_beside_last_classes(self) -> int:
        """Add blocks of the first classes while the last ones' gradient is room for what they need: the hidden states,
        and at first larger blocks.  Returns how many classes that were."""
        done, rows, sizes = 0, len(self.each.x), self.sizes
        free = self.classes - rows
        if free < sizes.classes:
            return 0
        x = self.dw[free : self.classes]
        self.take(x)(self.rows.count, 0)
        for length, width in (
            (2 * sizes.rows, 2 * sizes.classes),
            (sizes.rows, 2 * sizes.classes),
            (sizes.rows, sizes.classes),
        ):
            buffer, below = self.buffer, free
            if width > sizes.classes:
                below -= -(-self._needed(length, width) // self.hidden)
                buffer = self.dw[max(below, 0) : free].view(-1)
            last = done + max(below - done, 0) // width * width
            if last > done:
                self._add(range(done, last, width), length, x, buffer)
            done = last
        return done

    def _needed(self, length: int, width: int) -> int:
        """Elements of a buffer for a block and its classes' lower plane."""
        return length * width + width * low_stride(self.hidden, self.tiles.block_weight_sum) // 2

    def _add(self, classes: range, length: int, x: Tensor, buffer: Tensor | None = None) -> None:
        """Add the blocks of these classes to both sums, ``length`` rows at a time.

        ``x`` has all rows that count, or takes those of a chunk, whose buffer leaves room for the blocks.
        """
        live, width, of_chunk = self.rows.count, classes.step, buffer is None
        buffer = self.buffer[self.chunk.numel() :] if buffer is None else buffer
        block_of, plane = buffer[: length * width].view(length, width), buffer[length * width :].view(torch.uint8)
        take = self.take(x) if of_chunk else None
        beside = SideStream(self.device, used=self.wanted.x and self.wanted.weight)
        if self.wanted.weight:
            self.dw[classes.start : classes.stop].zero_()
            self.begin_weight(live, classes.start, classes.stop)
        for first in classes:
            part = slice(first, min(first + width, classes.stop))
            dz = block_of[:, : part.stop - first]
            block = self.block_product(part, x, dz)
            add_hidden = self.hidden_sum(part, dz) if self.wanted.x else None
            add_weight = self.weight_sums(part, x, dz, plane, add_hidden) if self.wanted.weight else None
            add_bias = self.bias_sum(part, dz) if self.wanted.bias else None
            for start in range(0, len(self.each.x), length):
                if take is not None:
                    take(live, start)
                x_start = 0 if of_chunk else start
                block(live, start, x_start)
                beside.fork()
                if add_hidden is not None:
                    add_hidden(live, start)
                if add_weight is not None:
                    with beside:
                        add_weight[start > 0](live, start, x_start)
                if add_bias is not None:
                    add_bias(live, start)
                beside.join()

    def _spread(self) -> None:
        for start in reversed(self.each.starts):
            moved = self.dx[start : start + self.sizes.rows]
            self.chunk[: len(moved)].copy_(moved)
            moved.zero_()
            self.spread(self.rows.count, start)
        if self.dx is not self.out:
            self.out.copy_(self.dx)

    # ------------------------------------------------------------------------------------------------- products

    def block_product(self, part: slice, x: Tensor, dz: Tensor) -> Product:
        """Makes dz of the classes ``part``."""
        each, of_rows, terms = self.each, self.of_rows, self.each.terms
        return Product(
            "linear_cross_entropy_block",
            x,
            each.weight[part].t(),
            [
                len(dz),
                Blocks(dz, cut=False),
                *(of_rows.lse, of_rows.factor, of_rows.entry, of_rows.uniform, of_rows.label),
                each.bias if terms.bias is None else each.bias[part],
                each.mask[part] if each.chain["has_mask"] else each.mask,
                each.unused if terms.weight is None else terms.weight[part],
                part.start,
            ],
            {**each.chain, "smoothing": each.share > 0, "class_weight": terms.weight is not None},
            tiles=self.tiles.block,
        )

    def hidden_sum(self, part: slice, dz: Tensor) -> Product:
        return sum_product(
            dz,
            self.each.weight[part],
            self.dx,
            self.dx_plane,
            self.tiles.block_hidden_sum,
            rows="M",
            begins="sums" if part.start else "rounded",
            ends="always" if part.stop == self.classes else "never",
        )

    def weight_sums(self, part: slice, x: Tensor, dz: Tensor, plane: Tensor, beside: Product | None) -> list[Product]:
        """Of the first rows, and of later ones."""
        rounds, tiles = IDLE if beside is None else beside.rounds, self.tiles.block_weight_sum
        begins: tuple[Literal["rounded", "sums"], ...] = ("rounded", "sums")
        return [
            sum_product(dz.t(), x, self.dw[part], plane, tiles, rows="K", begins=each, ends="rows", beside=rounds)
            for each in begins
        ]

    def bias_sum(self, part: slice, dz: Tensor) -> Launch:
        return self.each.operands.block_sums(dz, part.start, self.of_rows.label, self.of_rows.entry)

    @cached_property
    def dx_plane(self) -> Tensor:
        return new_plane(self.dx, self.tiles.block_hidden_sum)

    # --------------------------------------------------------------------------------------------------- kernels

    @property
    def row_kernels(self) -> Any:
        return _row_module(not self.each.x.is_cuda)

    def take(self, out: Tensor) -> Launch:
        x = self.each.x
        arguments = [self.rows.index, x, x.stride(0), out]
        return Launch(self.row_kernels.take, (len(out),), self.each.per_row, arguments)

    @cached_property
    def spread(self) -> Launch:
        arguments = [self.rows.index, self.chunk, self.dx, self.dx.stride(0)]
        return Launch(self.row_kernels.spread, (self.sizes.rows,), self.each.per_row, arguments)

    @cached_property
    def begin_hidden(self) -> Launch:
        each = self.each
        arguments = [
            *(self.of_rows.label, self.of_rows.entry, each.weight, *each.weight.stride()),
            *(self.dx, self.dx.stride(0)),
        ]
        return Launch(self.row_kernels.begin_hidden, (len(each.x),), each.per_row, arguments)

    @cached_property
    def begin_weight(self) -> Launch:
        each = self.each
        keys, order = self.rows.by_target()
        return Launch(
            self.row_kernels.begin_weight,
            (len(each.x), -(-self.hidden // _COLUMNS)),
            {"HIDDEN": self.hidden, "COLUMNS": min(_COLUMNS, power_of_two(self.hidden)), "ROWS": _ROWS},
            [
                *(keys, order, self.rows.index, self.of_rows.entry, each.x, each.x.stride(0)),
                *(self.dw, *self.dw.stride()),
            ],
        )


@lru_cache(maxsize=2)
def _row_module(interpreted: bool) -> Any:
    return load(render("linear_cross_entropy_block_rows", interpreted=interpreted))

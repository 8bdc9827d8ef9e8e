"""Block-sparse products by batched products of torch.

Every part of a result is the sum of some parts of the source, each times a matrix.  Those parts are gathered side by
side, so that the sum is inside one matrix product.  Neighbouring parts of the result that have as many blocks are made
by one batched product, as many of them as keep what is gathered within the size of the source, and on a CPU within
:data:`_CACHED`.  How many blocks each has is read on the host once for a layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from structfly.lowering.block_products.listing import member_counts
from structfly.lowering.block_sparse.layout import BlockLayout, Grid
from structfly.lowering.block_sparse.listing import by_columns
from structfly.lowering.remembered import remembered

_CACHED = 1 << 18  # elements gathered at a time on a CPU: 1 MiB of float32


class _Run(NamedTuple):
    """Neighbouring parts of a result that are sums of ``each`` products."""

    parts: slice
    members: slice
    each: int

    @property
    def length(self) -> int:
        return int(self.parts.stop - self.parts.start)


def product(x: Tensor, values: Tensor, layout: BlockLayout, grid: Grid) -> Tensor:
    """y (tokens, rows of blocks * block_out) of x (tokens, columns of blocks * block_in)."""

    def matrices(members: slice) -> Tensor:
        return values[members].transpose(1, 2)

    return _sums_of_products(x, grid.block_in, layout.columns.flatten(), layout.counts(), grid.block_out, matrices)


def gradient_of_x(grad: Tensor, values: Tensor, layout: BlockLayout, grid: Grid) -> Tensor:
    """dx (tokens, columns of blocks * block_in) of dy (tokens, rows of blocks * block_out)."""
    listing = by_columns(layout, grid.columns)
    counts = remembered(member_counts, listing.starts)

    def matrices(members: slice) -> Tensor:
        return values[members] if listing.blocks is None else values.index_select(0, listing.blocks[members])

    return _sums_of_products(grad, grid.block_out, listing.sources, counts, grid.block_in, matrices)


def gradient_of_values(grad: Tensor, x: Tensor, values: Tensor, layout: BlockLayout) -> Tensor:
    """dV (nnz, block_out, block_in), of which ``values`` has shape and dtype."""
    tokens, (_, block_out, block_in) = len(x), values.shape
    made, columns = torch.empty_like(values), layout.columns.flatten()
    source = x.view(tokens, x.shape[1] // block_in, block_in)
    parts = grad.view(tokens, layout.block_rows, block_out)
    for run in _runs(layout.counts(), x, block_in):
        if run.each:
            gathered = source.index_select(1, columns[run.members]).view(tokens, run.length, run.each * block_in)
            products = torch.bmm(parts[:, run.parts].permute(1, 2, 0), gathered.transpose(0, 1))
            blocks = products.view(run.length, block_out, run.each, block_in).transpose(1, 2)
            made[run.members].view(run.length, run.each, block_out, block_in).copy_(blocks)
    return made


def _sums_of_products(
    source: Tensor, side: int, members: Tensor, counts: list[int], width: int, matrices: Callable[[slice], Tensor]
) -> Tensor:
    """(tokens, parts * width): part i is the sum over its ``counts[i]`` members m of source[m] @ matrix(m).

    Args:
        source: (tokens, any multiple of ``side``).
        members: which part of the source each product takes, those of part 0 first.
        matrices: of a slice of the members: (members, side, width).
    """
    tokens = len(source)
    made = source.new_empty(tokens, len(counts) * width)
    blocks = source.view(tokens, source.shape[1] // side, side)
    parts = made.view(tokens, len(counts), width)
    for run in _runs(counts, source, side):
        of = parts[:, run.parts].transpose(0, 1)
        if run.each:
            gathered = blocks.index_select(1, members[run.members]).view(tokens, run.length, run.each * side)
            of.baddbmm_(
                gathered.transpose(0, 1), matrices(run.members).reshape(run.length, run.each * side, width), beta=0
            )
        else:
            of.zero_()
    return made


def _runs(counts: list[int], source: Tensor, side: int) -> Iterator[_Run]:
    most = source.numel() if source.is_cuda else min(source.numel(), _CACHED)
    first = member = 0
    while first < len(counts):
        each = counts[first]
        last, fitting = first + 1, most // max(1, each * side * len(source))
        while last < len(counts) and counts[last] == each and last - first < fitting:
            last += 1
        members = slice(member, member + each * (last - first))
        yield _Run(slice(first, last), members, each)
        first, member = last, members.stop

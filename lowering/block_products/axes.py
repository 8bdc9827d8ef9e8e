"""Launches of the templates ``axis_products`` and ``axis_gradients``: small matrices along one axis of a lattice.

A tile is of several matrices, neighbours along the innermost axis, or, where that has one point only, along the
outermost: what stands beside one matrix's features in memory is another's, and a tile has both.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from structfly.lowering.block_products.ranges import add_ranges, ranges
from structfly.lowering.block_products.ready import REMEMBERED, Ready, ready
from structfly.lowering.descriptor import Boxes, Form, form
from structfly.lowering.gemm import Tiles, programs_on
from structfly.lowering.template import Parameter


def axis_products(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    tiles: Tiles,
    batch: int,
    turned: bool = False,
    bias: Tensor | None = None,
    activation: str = "",
) -> None:
    """c[:, o, :, i] = a[:, o, :, i] b[i, o]^T, or, if ``turned``, a[:, o, :, i] b[i, o]; + bias.

    Args:
        a: (tokens, outer, K, inner).
        b: (inner, outer, N, K), or if ``turned`` (inner, outer, K, N).
        c: (tokens, outer, N, inner), written.
        tiles: how the products are cut.
        batch: matrices of a tile.
        bias: as a row of ``c``, or None.
        activation: of :data:`~structfly.lowering.activations.ACTIVATIONS`, applied to the float32 sums, or "".

    Raises:
        UnsupportedError: an operand's layout has no tensor descriptor.
    """
    if not c.numel():
        return
    of_bias = None if bias is None else bias.dtype
    products = _products(form(a), form(b), form(c), tiles, batch, turned, of_bias, activation)
    products(a, b, c) if bias is None else products(a, b, bias, c)


@lru_cache(maxsize=REMEMBERED)
def _products(
    of_a: Form,
    of_b: Form,
    of_c: Form,
    tiles: Tiles,
    batch: int,
    turned: bool,
    of_bias: torch.dtype | None,
    activation: str,
) -> Ready:
    """Products of tensors of such forms, in the order of the template's arguments."""
    a, b, c = of_a.like(), of_b.like(), of_c.like()
    tokens, outer, side_n, inner = c.shape
    count, runs = _matrices(outer, inner, batch)
    parameters: dict[str, Parameter] = {
        "inner": inner > 1,
        "count": count,
        "runs": runs,
        "batch": batch,
        "side_n": side_n,
        "side_k": a.shape[2],
        "turned": turned,
        "bias": of_bias is not None,
        "activation": activation,
    }
    box_b = (tiles.k, tiles.n) if turned else (tiles.n, tiles.k)
    if inner > 1:
        operands = [Boxes(a, (tiles.m, 1, tiles.k, batch), operand=True), Boxes(b, (batch, 1, *box_b), operand=True)]
        written = Boxes(c, (tiles.m, 1, tiles.n, batch))
    else:
        operands = [
            Boxes(a[..., 0], (tiles.m, batch, tiles.k), operand=True),
            Boxes(b[0], (batch, *box_b), operand=True),
        ]
        written = Boxes(c[..., 0], (tiles.m, batch, tiles.n))
    across = runs * (outer if inner > 1 else 1)
    total = -(-tokens // tiles.m) * across * -(-side_n // tiles.n)
    takes, sizes = [*operands, *([] if of_bias is None else [None]), written], (tokens, across, 0)
    return ready("axis_products", takes, sizes, total, parameters, tiles, a.dtype, of_a.device)


def axis_gradients(a: Tensor, b: Tensor, *, tiles: Tiles, batch: int) -> Tensor:
    """(inner, outer, M, N) of a[:, o, :, i]^T b[:, o, :, i], summed over the tokens.

    Where that takes less time, the tokens are cut in ranges whose sums are added in float32, in order.

    Args:
        a: (tokens, outer, M, inner).
        b: (tokens, outer, N, inner).
        tiles: how the products are cut.
        batch: matrices of a tile.

    Raises:
        UnsupportedError: an operand's layout has no tensor descriptor.
    """
    tokens, outer, side_m, inner = a.shape
    side_n = b.shape[2]
    if not tokens:
        return a.new_zeros(inner, outer, side_m, side_n)
    total = _rows_of_tiles(outer, side_m, inner, tiles, batch) * -(-side_n // tiles.n)
    split = ranges(total, tokens, tiles.k, programs_on(a.device, tiles), a.element_size())
    sums = a.new_empty(split, inner, outer, side_m, side_n, dtype=torch.float32)
    _gradients(form(a), form(b), tiles, batch, split)(a, b, sums)
    made = a.new_empty(sums.shape[1:])
    add_ranges(sums.flatten(1), [made])
    return made


@lru_cache(maxsize=REMEMBERED)
def _gradients(of_a: Form, of_b: Form, tiles: Tiles, batch: int, split: int) -> Ready:
    """Sums (ranges, inner, outer, M, N) of tensors of such forms, in the order of the template's arguments."""
    a, b = of_a.like(), of_b.like()
    (tokens, outer, side_m, inner), side_n = a.shape, b.shape[2]
    _, runs = _matrices(outer, inner, batch)
    parameters: dict[str, Parameter] = {
        "inner": inner > 1,
        "runs": runs,
        "batch": batch,
        "side_m": side_m,
        "side_n": side_n,
    }
    sums = torch.empty(split, inner, outer, side_m, side_n, device="meta")
    sides = ((a, tiles.m), (b, tiles.n))
    if inner > 1:
        operands = [Boxes(each, (tiles.k, 1, wide, batch), operand=True) for each, wide in sides]
        written = Boxes(sums, (1, batch, 1, tiles.m, tiles.n))
    else:
        operands = [Boxes(each[..., 0], (tiles.k, batch, wide), operand=True) for each, wide in sides]
        written = Boxes(sums[:, 0], (1, batch, tiles.m, tiles.n))
    tall = _rows_of_tiles(outer, side_m, inner, tiles, batch)
    sizes, total = (tall * tiles.m, side_n, tokens), tall * -(-side_n // tiles.n)
    takes = [*operands, written]
    return ready("axis_gradients", takes, sizes, total, parameters, tiles, a.dtype, of_a.device, split)


def _rows_of_tiles(outer: int, side_m: int, inner: int, tiles: Tiles, batch: int) -> int:
    """Tiles of all matrices' gradients along their rows."""
    _, runs = _matrices(outer, inner, batch)
    return runs * (outer if inner > 1 else 1) * -(-side_m // tiles.m)


def _matrices(outer: int, inner: int, batch: int) -> tuple[int, int]:
    """How many matrices stand along the axis that tiles take several of, and how many tiles those make."""
    count = inner if inner > 1 else outer
    return count, -(-count // batch)

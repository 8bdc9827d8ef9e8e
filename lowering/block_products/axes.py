"""Launches of the templates ``axis_products`` and ``axis_gradients``: small matrices along one axis of a lattice.

A tile is of several matrices, neighbours along the innermost axis, or, where that has one point only, along the
outermost: what stands beside one matrix's features in memory is another's, and a tile has both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from structfly.lowering.block_products.products import launch_product
from structfly.lowering.block_products.ranges import add_ranges, ranges
from structfly.lowering.descriptor import descriptor, operand
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
    tokens, outer, side_n, inner = c.shape
    if not c.numel():
        return
    count, runs = _matrices(outer, inner, batch)
    parameters: dict[str, Parameter] = {
        "inner": inner > 1,
        "count": count,
        "runs": runs,
        "batch": batch,
        "side_n": side_n,
        "side_k": a.shape[2],
        "turned": turned,
        "bias": bias is not None,
        "activation": activation,
    }
    box_b = (tiles.k, tiles.n) if turned else (tiles.n, tiles.k)
    if inner > 1:
        operands = [operand(a, tiles.m, 1, tiles.k, batch), operand(b, batch, 1, *box_b)]
        written = descriptor(c, tiles.m, 1, tiles.n, batch)
    else:
        operands = [operand(a[..., 0], tiles.m, batch, tiles.k), operand(b[0], batch, *box_b)]
        written = descriptor(c[..., 0], tiles.m, batch, tiles.n)
    across = runs * (outer if inner > 1 else 1)
    total = -(-tokens // tiles.m) * across * -(-side_n // tiles.n)
    arguments = [written] if bias is None else [bias, written]
    launch_product("axis_products", operands, arguments, (tokens, across, 0), total, parameters, tiles, a)


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
    _, runs = _matrices(outer, inner, batch)
    parameters: dict[str, Parameter] = {
        "inner": inner > 1,
        "runs": runs,
        "batch": batch,
        "side_m": side_m,
        "side_n": side_n,
    }
    tall = runs * (outer if inner > 1 else 1) * -(-side_m // tiles.m)
    total = tall * -(-side_n // tiles.n)
    split = ranges(total, tokens, tiles.k, programs_on(a.device, tiles), a.element_size())
    sums = a.new_empty(split, inner, outer, side_m, side_n, dtype=torch.float32)
    if inner > 1:
        operands = [operand(each, tiles.k, 1, wide, batch) for each, wide in ((a, tiles.m), (b, tiles.n))]
        written = descriptor(sums, 1, batch, 1, tiles.m, tiles.n)
    else:
        operands = [operand(each[..., 0], tiles.k, batch, wide) for each, wide in ((a, tiles.m), (b, tiles.n))]
        written = descriptor(sums[:, 0], 1, batch, tiles.m, tiles.n)
    sizes = (tall * tiles.m, side_n, tokens)
    launch_product("axis_gradients", operands, [written], sizes, total, parameters, tiles, a, split)
    made = a.new_empty(sums.shape[1:])
    add_ranges(sums.flatten(1), [made])
    return made


def _matrices(outer: int, inner: int, batch: int) -> tuple[int, int]:
    """How many matrices stand along the axis that tiles take several of, and how many tiles those make."""
    count = inner if inner > 1 else outer
    return count, -(-count // batch)

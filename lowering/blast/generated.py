"""Products with BLAST weights generated for GPUs, in chunks of tokens; the same bits every time.

What stands between the products, z and h of :mod:`structfly.lowering.blast.op`, has rank numbers for each token and
each block of a side: with 16 blocks and a rank of 512 of 4096 features, twice as many as x.  So neither is ever whole:
a chunk's z and, in its place, h stay in the second-level cache, and memory moves x and y.  Nothing is kept: backward
makes z again, and sums the factors' gradients over the chunks in float32, in order.

N tokens of n features each way take 4 N n r operations in the two products, and z and h, written and read in 16 bits,
8 N r blocks bytes.  With N = 16384, n = 4096, r = 512 and 16 blocks that is .18 ms at 750 TFLOP/s and, from memory,
.36 ms at 3 TB/s, four times as long as x and y.  A product that mixed what it makes at once would sum for every row of
blocks: in 128 KiB of registers for 64 tokens by 32 components, for which x and V are read 3.2e9 bytes from the cache,
where tiles of 128 by 256 read .8e9.  So z, h and y have a launch each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from structfly.lowering.blast.mixing import MOST_BLOCKS, TILE, mixing, mixing_with_gradients, ranges
from structfly.lowering.block_products.chunks import Step, chunk_gradients, chunk_products, rows_of_chunk
from structfly.lowering.block_products.matrix_tiles import gradient_tiles, product_tiles
from structfly.lowering.block_products.support import padded, why_no_products
from structfly.lowering.layer_op import Applied

_LEAST_PART = 4  # of a chunk's tokens at most: chunks smaller than one of so many parts take too many launches


def why_not(factors: Sequence[Tensor]) -> str:
    """Why products with these factors are not generated, or ""."""
    right, scale, left = factors
    blocks = max(scale.shape[1:])
    if blocks > MOST_BLOCKS:
        return f"there are {blocks} blocks along a side; generated are products with {MOST_BLOCKS} at most"
    return why_no_products(right, (right.shape[2], right.shape[1], left.shape[1]))


def forward(call: Applied) -> Tensor:
    """y."""
    right, scale, left = call.factors
    (rows, outer, _), (out_features,) = left.shape, call.static
    if not len(call.x):  # of which there is no descriptor
        return call.x.new_empty(0, out_features)
    y = call.x.new_empty(len(call.x), rows, outer)
    bias = None if call.bias is None else padded(call.bias[None], rows * outer).view(rows, outer)
    (held,) = call.x.new_empty(_held_shape(call, 1))
    steps = [
        _components(right, _in_blocks(call.x, right), held),
        mixing(held, scale),
        _features(held, left, y, bias=bias),
    ]
    _run(steps, held, 0, len(y))
    return y.flatten(1)[:, :out_features].contiguous()


def backward(grad: Tensor, call: Applied, wanted: Sequence[bool]) -> list[Tensor | None]:
    """The gradients that are wanted, of x and each factor."""
    if not len(grad) or not any(wanted):
        sources = (call.x, *call.factors)
        return [each.new_zeros(each.shape) if want else None for each, want in zip(sources, wanted, strict=True)]
    return [None if each is None else each.to(grad.dtype) for each in _gradients(grad, call, wanted)]


def _gradients(grad: Tensor, call: Applied, wanted: Sequence[bool]) -> list[Tensor | None]:
    """The same, sums over the chunks in float32."""
    right, scale, left = call.factors
    rank = right.shape[1]
    for_x, for_right, for_scale, for_left = wanted
    z_taken, dh_taken = for_scale or for_left, for_x or for_right or for_scale
    x, above = _in_blocks(call.x, right), _in_blocks(grad, left.mT)
    dx = x.new_empty(x.shape if for_x else 0)
    of_right, of_left = (
        factor.new_zeros(factor.shape if want else 0, dtype=torch.float32)
        for factor, want in ((right, for_right), (left, for_left))
    )
    places = _places(call, dx, z_taken + dh_taken)
    parts = ranges(rank, places[0].held.shape[3], right.device) if z_taken and dh_taken else 0
    of_scale = scale.new_zeros(parts, *scale.shape, dtype=torch.float32)
    for first, last, held in places:
        z, dh, width = held[0], held[-1], held.shape[3]
        steps: list[Step] = []
        if z_taken:
            steps.append(_components(right, x, z))
        if dh_taken:
            steps.append(_components(left, above, dh, turned=True))
        if z_taken and dh_taken:
            steps.append(mixing_with_gradients(z, dh, scale, of_scale))
        else:
            steps.append(mixing(z, scale if z_taken else scale.mT))
        if for_x:
            steps.append(_features(dh, right, dx, turned=True))
        if for_right:
            tiles = gradient_tiles(right, width, len(right), (1, rank), right.shape[2])
            steps.append(chunk_gradients(dh[: len(right)], x.transpose(0, 1), of_right, rows="b", tiles=tiles))
        if for_left:
            tiles = gradient_tiles(left, width, len(left), (1, left.shape[1]), rank)
            steps.append(chunk_gradients(above.transpose(0, 1), z[: len(left)], of_left, rows="a", tiles=tiles))
        _run(steps, held, first, last)
    made = (dx.flatten(1)[:, : call.x.shape[1]] if for_x else dx, of_right, of_scale.sum(0), of_left)
    return [each if want else None for each, want in zip(made, wanted, strict=True)]


class _Place(NamedTuple):
    """Tokens from the ``first`` to the ``last``, not among them, whose chunks are held in the same place."""

    first: int
    last: int
    held: Tensor


def _places(call: Applied, dx: Tensor, buffers: int) -> list[_Place]:
    """Where backward holds its chunks, so that it takes no more than the dense weight's gradient, if that can be.

    Where a chunk and the sums are more, chunks are held in the last rows of ``dx`` (N, blocks, side) until those are
    made, and those of the last tokens are of so many fewer as fit; not where they would be of less than a quarter, or
    where ``dx`` is (0,), not to be made.
    """
    tokens, size = len(call.x), call.x.element_size()
    *planes, width = shape = _held_shape(call, buffers)
    of_sums = torch.float32.itemsize * sum(factor.numel() for factor in call.factors)
    room = size * call.x.shape[1] * call.static[0] - of_sums
    fewer = room // (size * math.prod(planes)) // TILE * TILE
    before = (dx.numel() - math.prod(shape)) // max(1, dx[:1].numel()) // width * width
    if before <= 0 or not width <= _LEAST_PART * fewer < _LEAST_PART * width:
        return [_Place(0, tokens, call.x.new_empty(shape))]
    shared = dx.view(-1)[dx.numel() - math.prod(shape) :].view(shape)
    return [_Place(0, before, shared), _Place(before, tokens, call.x.new_empty(*planes, fewer))]


def _held_shape(call: Applied, buffers: int) -> tuple[int, int, int, int]:
    """(buffers, planes, rank, tokens of a chunk): each holds components of the inputs' or of the outputs' blocks."""
    right, _, left = call.factors
    rank = right.shape[1]
    planes = max(len(right), len(left))
    row_bytes = buffers * planes * rank * right.element_size()
    return buffers, planes, rank, rows_of_chunk(len(call.x), row_bytes, TILE, right.device)


def _in_blocks(rows: Tensor, factor: Tensor) -> Tensor:
    """(N, blocks, side) of (N, features), with zeros after the features, for a factor (blocks, rank, side)."""
    blocks, _, side = factor.shape
    return padded(rows, blocks * side).view(len(rows), blocks, side)


def _components(factor: Tensor, blocks: Tensor, held: Tensor, *, turned: bool = False) -> Step:
    """held[i] = factor[i] blocks[:, i]^T of a chunk, or, if ``turned``, factor[i]^T blocks[:, i]^T."""
    made = held[: len(factor)]
    _, rank, width = made.shape
    tiles = product_tiles(factor, rank, (1, width), (1, blocks.shape[2]))
    return chunk_products(factor, blocks.transpose(0, 1), made, rows="b", a_turned=turned, tiles=tiles)


def _features(held: Tensor, factor: Tensor, made: Tensor, *, turned: bool = False, bias: Tensor | None = None) -> Step:
    """made[:, i] = held[i]^T factor[i]^T + bias[i] of a chunk, or, if ``turned``, held[i]^T factor[i]."""
    _, rank, width = held.shape
    tiles = product_tiles(factor, width, (1, made.shape[2]), (1, rank))
    taken, by_matrix = held[: len(factor)], made.transpose(0, 1)
    return chunk_products(taken, factor, by_matrix, rows="c", a_turned=True, b_turned=turned, bias=bias, tiles=tiles)


def _run(steps: Sequence[Step], held: Tensor, first: int, last: int) -> None:
    for start in range(first, last, held.shape[-1]):
        for step in steps:
            step(start)

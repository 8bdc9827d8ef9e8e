"""Products with BLAST weights generated for GPUs; the same bits every time.

What stands between the products, z and h of :mod:`structfly.lowering.blast.op`, has rank numbers for each token and
each block of a side: with 16 blocks and a rank of 512 of 4096 features, twice as many as x.  N tokens of n features
each way take 4 N n r operations in the two products, and z and h, written and read in 16 bits, 8 N r blocks bytes.
With N = 16384, n = 4096, r = 512 and 16 blocks that is .18 ms at 750 TFLOP/s and, from memory, .36 ms at 3 TB/s, four
times as long as x and y.  A product that mixed what it makes at once would sum for every row of blocks: in 128 KiB of
registers for 64 tokens by 32 components, for which x and V are read 3.2e9 bytes from the cache, where tiles of 128 by
256 read .8e9.  So z, h and y have a launch each.

Forward keeps z, and backward makes h again where it makes dz.  Where nothing is kept, both take a chunk of tokens at a
time, of which z and h are in one place: so many tokens as need no more memory than the gradients of the dense weight's
layer.  Backward then makes z again, and adds to the factors' gradients, sums in float32, chunk after chunk; where dx is
wanted, the first chunks are held in its memory: :mod:`structfly.lowering.blast.runs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from structfly.lowering.blast.mixing import MOST_BLOCKS, mixing, mixing_with_gradients, ranges
from structfly.lowering.blast.runs import Run, runs_within
from structfly.lowering.block_products.chunks import Step, chunk_gradients, chunk_products, rows_of_chunk
from structfly.lowering.block_products.matrix_tiles import GRADIENTS, PRODUCTS, gradient_tiles, product_tiles
from structfly.lowering.block_products.support import padded, padded_rows, why_no_products
from structfly.lowering.gemm import Tiles
from structfly.lowering.layer_products import Applied

# Of y and dx, whose inner dimension is the rank, and of the factors' gradients, which two programs of a multiprocessor
# add to float32 sums in turn.
FEATURES = replace(PRODUCTS, parts=4)
SUMS = (Tiles(m=128, n=128, k=64, group=8, parts=4, warps=4, stages=3, resident=2), *GRADIENTS[2:])


def why_not(factors: Sequence[Tensor], tf32: bool) -> str:
    """Why products with these factors are not generated, or ""; ``tf32`` as :func:`why_no_products` has it."""
    right, scale, left = factors
    blocks = max(scale.shape[1:])
    if blocks > MOST_BLOCKS:
        return f"there are {blocks} blocks along a side; generated are products with {MOST_BLOCKS} at most"
    return why_no_products(right, (right.shape[2], right.shape[1], left.shape[1]), tf32)


def between(call: Applied) -> list[Tensor]:
    """z (column_blocks, rank, :func:`padded_rows` of N), 0 beyond N."""
    right = call.factors[0]
    z = call.x.new_empty(*right.shape[:2], padded_rows(len(call.x)))
    if len(call.x):
        _components(right, _in_blocks(call.x, right), z)(0)
    return [z]


def finish(call: Applied, between: Sequence[Tensor]) -> Tensor:
    """y."""
    (z,), (rows, _, rank) = between, call.factors[2].shape
    return _outputs(call, [], z, z.new_empty(rows, rank, z.shape[2]))


def backward(grad: Tensor, call: Applied, between: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """The gradients that are wanted, of x and each factor."""
    tokens = len(grad)
    return _gradients(grad, call, wanted, [Run(0, tokens, padded_rows(tokens), within=False)], between[0])


def forward_in_chunks(call: Applied) -> Tensor:
    """y."""
    right = call.factors[0]
    held = call.x.new_empty(_planes(call), right.shape[1], forward_tokens(call))
    made = [_components(right, _in_blocks(call.x, right), held)] if len(call.x) else []
    return _outputs(call, made, held, held)


def backward_in_chunks(grad: Tensor, call: Applied, wanted: Sequence[bool]) -> list[Tensor | None]:
    """The gradients that are wanted, of x and each factor."""
    return _gradients(grad, call, wanted, backward_runs(call, wanted), None)


def forward_tokens(call: Applied) -> int:
    """Of a chunk whose components take no more bytes than the dense weight's layer has in gradients of x and weight."""
    room = call.x.element_size() * call.x.shape[1] * (len(call.x) + call.static[0])
    return rows_of_chunk(len(call.x), _token_bytes(call), room)


def backward_runs(call: Applied, wanted: Sequence[bool]) -> list[Run]:
    """Of chunks whose components take, with the sums over the chunks, no more bytes beside dx than the dense weight's
    gradient; of few tokens where that is not to be had."""
    right, tokens = call.factors[0], len(call.x)
    of_sums = torch.float32.itemsize * sum(factor.numel() for factor in call.factors)
    room = call.x.element_size() * call.x.shape[1] * call.static[0] - of_sums

    def alone(rest: int) -> int:
        return rows_of_chunk(rest, 2 * _token_bytes(call), room)  # of z and h, and of dh and dz

    if not wanted[0]:
        return [Run(0, tokens, alone(tokens), within=False)]
    held = sum(_taken(wanted)) * _planes(call) * right.shape[1]
    return list(runs_within(tokens, len(right) * right.shape[2], held, alone))


def _outputs(call: Applied, first: list[Step], z: Tensor, w: Tensor) -> Tensor:
    """y of z, which the first steps make of a chunk, with w in the place where the chunk's h is made."""
    _, scale, left = call.factors
    (rows, outer, _), (out_features,) = left.shape, call.static
    if not len(call.x):  # of which there is no descriptor
        return call.x.new_empty(0, out_features)
    y = call.x.new_empty(len(call.x), rows, outer)
    bias = None if call.bias is None else padded(call.bias[None], rows * outer).view(rows, outer)
    steps = [*first, mixing(z, w, scale), _features(w, left, y, bias=bias, activation=call.activation)]
    _run(steps, len(y), z.shape[2])
    return y.flatten(1)[:, :out_features].contiguous()


def _gradients(
    grad: Tensor, call: Applied, wanted: Sequence[bool], runs: Sequence[Run], kept: Tensor | None
) -> list[Tensor | None]:
    """The gradients that are wanted, in chunks; ``kept`` is z of all tokens, or None."""
    right, scale, left = call.factors
    sources = (call.x, *call.factors)
    if not len(grad) or not any(wanted):
        return [each.new_zeros(each.shape) if want else None for each, want in zip(sources, wanted, strict=True)]
    for_x, for_right, _, for_left = wanted
    dx = call.x.new_empty((len(grad), len(right), right.shape[2]) if for_x else 0)
    of_right, of_left = (
        factor.new_zeros(factor.shape if want else 0, dtype=torch.float32)
        for factor, want in ((right, for_right), (left, for_left))
    )
    parts = max(ranges(scale, run.width) for run in runs) if all(_taken(wanted)) else 0
    of_scale = scale.new_zeros(parts, *scale.shape, dtype=torch.float32)
    made = _Made(dx, of_right, of_scale, of_left)
    x, above = _in_blocks(call.x, right), _in_blocks(grad, left.mT)
    for run in runs:
        # What is held is let go of before other memory is asked for, the rounded sums' at last.
        _run(_backward_steps(x, above, call, wanted, run, kept, made), run.stop, run.width, run.start)
    rounded = (dx.flatten(1)[:, : call.x.shape[1]] if for_x else dx, of_right, of_scale.sum(0), of_left)
    return [each.to(grad.dtype) if want else None for each, want in zip(rounded, wanted, strict=True)]


class _Made(NamedTuple):
    """What a backward makes: dx (N, column_blocks, in_block), and the factors' gradients in float32, that of the scale
    in ranges."""

    dx: Tensor
    of_right: Tensor
    of_scale: Tensor
    of_left: Tensor


def _backward_steps(
    x: Tensor, above: Tensor, call: Applied, wanted: Sequence[bool], run: Run, kept: Tensor | None, made: _Made
) -> list[Step]:
    """Those of a run's chunks."""
    right, scale, left = call.factors
    for_x, for_right, _, for_left = wanted
    z_taken, dh_taken = _taken(wanted)
    size = torch.Size((z_taken + dh_taken, _planes(call), right.shape[1], run.width))
    held = made.dx.flatten()[made.dx.numel() - size.numel() :].view(size) if run.within else x.new_empty(size)
    w, dh = held[0], held[-1]
    z = w if kept is None else kept
    steps: list[Step] = []
    if z_taken and kept is None:
        steps.append(_components(right, x, z))
    if dh_taken:
        steps.append(_components(left, above, dh, turned=True))
    if z_taken and dh_taken:
        steps.append(mixing_with_gradients(z, w, dh, scale, made.of_scale[: ranges(scale, run.width)]))
    else:
        steps.append(mixing(z, w, scale) if z_taken else mixing(dh, dh, scale.mT))
    if for_x:
        steps.append(_features(dh, right, made.dx, turned=True))
    if for_right:
        steps.append(_added(dh[: len(right)], x.transpose(0, 1), made.of_right, rows="b"))
    if for_left:
        steps.append(_added(above.transpose(0, 1), w[: len(left)], made.of_left, rows="a"))
    return steps


def _taken(wanted: Sequence[bool]) -> tuple[bool, bool]:
    """Whether the gradients that are wanted take z, and dh."""
    for_x, for_right, for_scale, for_left = wanted
    return for_scale or for_left, for_x or for_right or for_scale


def _token_bytes(call: Applied) -> int:
    """Of a token's components in one buffer."""
    return _planes(call) * call.factors[0].shape[1] * call.x.element_size()


def _planes(call: Applied) -> int:
    """Blocks of a buffer that holds components of the inputs' or of the outputs' blocks."""
    return max(call.factors[1].shape[1:])


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


def _features(
    held: Tensor,
    factor: Tensor,
    made: Tensor,
    *,
    turned: bool = False,
    bias: Tensor | None = None,
    activation: str = "",
) -> Step:
    """made[:, i] = held[i]^T factor[i]^T + bias[i] of a chunk, or, if ``turned``, held[i]^T factor[i]."""
    _, rank, width = held.shape
    tiles = product_tiles(factor, width, (1, made.shape[2]), (1, rank), FEATURES)
    taken, by_matrix = held[: len(factor)], made.transpose(0, 1)
    return chunk_products(
        taken,
        factor,
        by_matrix,
        rows="c",
        a_turned=True,
        b_turned=turned,
        bias=bias,
        activation=activation,
        tiles=tiles,
    )


def _added(a: Tensor, b: Tensor, sums: Tensor, *, rows: Literal["a", "b"]) -> Step:
    """sums[i] += a[i] b[i]^T of a chunk's rows, as :func:`chunk_gradients` has them."""
    held = b if rows == "a" else a
    tiles = gradient_tiles(held, held.shape[2], len(sums), (1, sums.shape[1]), sums.shape[2], SUMS)
    return chunk_gradients(a, b, sums, rows=rows, tiles=tiles)


def _run(steps: Sequence[Step], stop: int, width: int, start: int = 0) -> None:
    """Take the steps with the chunks of tokens up to ``stop``, one after another."""
    for first in range(start, stop, width):
        for step in steps:
            step(first)

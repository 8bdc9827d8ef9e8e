"""Launches of the templates ``chunk_products`` and ``chunk_gradients``: the same products of chunk after chunk of rows.

What is made of a chunk is held with its rows last, (matrices, side, width), in the same place for each, so that it
takes the memory of one.  One chunk may be of all rows.  A product is made ready once: descriptors are those of all
rows, and a launch says only where its chunk starts.  Rows beyond the last are read as zeros, and what is made of them
is 0, or is not written.  Chunks follow each other in order: a tile that reaches beyond its chunk's rows writes what
the next chunk's overwrites.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from structfly.lowering.block_products.ready import product_launch
from structfly.lowering.block_products.support import padded_rows, with_inner_side_last
from structfly.lowering.descriptor import descriptor, operand
from structfly.lowering.gemm import Tiles
from structfly.lowering.launch import on_device
from structfly.lowering.template import Parameter

Step: TypeAlias = Callable[[int], None]
"""What is done with the chunk that starts at such a row."""

_WHOLE = 128  # rows that chunks are multiples of: the longest side of a tile that they fill
_LEAST = 256  # rows of a chunk at least: with fewer, tiles of theirs are too few for the processors


def rows_of_chunk(rows: int, row_bytes: int, room: int) -> int:
    """Of how many rows equal chunks are, as few as can be, so that what is held of one takes no more than ``room``.

    Args:
        rows: of all chunks.
        row_bytes: held for each.
        room: bytes; where they are for a few rows only, chunks take more.

    Returns:
        All, padded as components are, or a multiple of the longest side of a tile.
    """
    every = padded_rows(rows)
    if rows <= _LEAST or every * row_bytes <= room:
        return every
    most = max(_LEAST, room // row_bytes // _WHOLE * _WHOLE)
    chunks = -(-rows // most)
    return -(-rows // (chunks * _WHOLE)) * _WHOLE


def chunk_products(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    rows: Literal["b", "c"],
    tiles: Tiles,
    a_turned: bool = False,
    b_turned: bool = False,
    bias: Tensor | None = None,
    activation: str = "",
) -> Step:
    """c[i] = a[i] b[i]^T + bias[i], the chunk being rows of b, and columns of c, or rows of a and c.

    Args:
        a: (matrices, M, K), or if ``a_turned`` (matrices, K, M).
        b: (matrices, N, K), or if ``b_turned`` (matrices, K, N).
        c: (matrices, M, N), written.
        rows: which of them holds all rows where the others hold the chunk's: "b" in the place of N, "c" in that of M.
        tiles: how the products are cut.
        bias: (matrices, N), or None.
        activation: of :data:`~structfly.lowering.activations.ACTIVATIONS`, applied to the float32 sums, or "".

    Raises:
        UnsupportedError: an operand's layout has no tensor descriptor.
    """
    if a.dtype == torch.float32 and rows == "b" and a_turned:
        a, a_turned = with_inner_side_last(a), False
    if a.dtype == torch.float32 and rows == "c" and b_turned:
        b, b_turned = with_inner_side_last(b), False
    sizes = (a.shape[2 if a_turned else 1], c.shape[2], a.shape[1 if a_turned else 2])
    parameters: dict[str, Parameter] = {
        "rows": rows,
        "a_turned": a_turned,
        "b_turned": b_turned,
        "bias": bias is not None,
        "activation": activation,
    }
    operands = [
        operand(a, 1, *((tiles.k, tiles.m) if a_turned else (tiles.m, tiles.k))),
        operand(b, 1, *((tiles.k, tiles.n) if b_turned else (tiles.n, tiles.k))),
        *([] if bias is None else [bias]),
        descriptor(c, 1, tiles.m, tiles.part),
    ]
    return _ready("chunk_products", operands, sizes, parameters, tiles, a)


def chunk_gradients(a: Tensor, b: Tensor, c: Tensor, *, rows: Literal["a", "b"], tiles: Tiles) -> Step:
    """c[i] += the sum of a[i, r] b[i, r]^T over the chunk's rows r; the same bits every time.

    Args:
        a, b: one is (matrices, all rows, side), the other (matrices, side, the chunk's rows).
        c: (matrices, side of a, side of b) float32, added to.
        rows: which of a and b holds all rows.
        tiles: how the products are cut.

    Raises:
        UnsupportedError: an operand's layout has no tensor descriptor.
    """
    held = b if rows == "a" else a
    sizes = (c.shape[1], c.shape[2], held.shape[2])
    operands = [
        operand(a, 1, *((tiles.k, tiles.m) if rows == "a" else (tiles.m, tiles.k))),
        operand(b, 1, *((tiles.k, tiles.n) if rows == "b" else (tiles.n, tiles.k))),
        descriptor(c, 1, tiles.m, tiles.part),
    ]
    return _ready("chunk_gradients", operands, sizes, {"rows": rows}, tiles, a)


def _ready(
    template: str,
    operands: list[Any],
    sizes: tuple[int, int, int],
    parameters: dict[str, Parameter],
    tiles: Tiles,
    like: Tensor,
) -> Step:
    matrices = len(like)
    count = -(-sizes[0] // tiles.m) * matrices * -(-sizes[1] // tiles.n)
    launch = product_launch(template, count, parameters, tiles, like.dtype, like.device, (matrices, *sizes))

    def step(start: int) -> None:
        with on_device(like.device):
            launch(*operands, start)

    return step

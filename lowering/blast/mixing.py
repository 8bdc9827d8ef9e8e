"""The launch of the template ``blast_mixing``: what each row of blocks has of each component, of what the columns give.

With the tokens along each component's row the product for a component p, s_p (row_blocks, column_blocks) times z_p
(column_blocks, tokens), has its operands as tensor cores take them, whatever the number of tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from structfly.lowering.block_products.chunks import Step
from structfly.lowering.gemm import processors_of
from structfly.lowering.launch import Launch, on_device
from structfly.lowering.template import load, render

MOST_BLOCKS = 64
"""Along a side: a program has a tile of all of them."""
TILE = 256
"""Tokens of a tile of 16 blocks of 16-bit numbers; one of more blocks or wider numbers has as many bytes."""
_RESIDENT = 8  # programs that share a multiprocessor, so that one waits while another loads
WARPS, STAGES = 2, 3


def ranges(scale: Tensor, width: int) -> int:
    """In how many ranges the tokens are cut, so that the processors have enough programs."""
    components, *blocks = scale.shape
    tiles = -(-width // tile(blocks, width, scale.element_size()))
    return max(1, min(tiles, _RESIDENT * processors_of(scale.device) // components))


def tile(blocks: list[int], width: int, itemsize: int = 2) -> int:
    """Tokens of a tile of so many blocks of the outputs and the inputs, where there are ``width``."""
    return min(16 * TILE * 2 // (itemsize * max(map(side, blocks))), side(width))


def side(count: int) -> int:
    """Of a tile that holds so many, and is as long as tensor cores need it at least."""
    return max(16, 1 << (count - 1).bit_length())


def mixing(z: Tensor, w: Tensor, scale: Tensor) -> Step:
    """Put scale z in w.

    Args:
        z: (planes, components, width), contiguous; its first ``column_blocks`` planes are read.  The width is a
            multiple of 8.
        w: as ``z``, or z itself; its first ``row_blocks`` planes are written.
        scale: (components, row_blocks, column_blocks).
    """
    return _step([z, w], scale, gradients=False)


def mixing_with_gradients(z: Tensor, w: Tensor, above: Tensor, scale: Tensor, sums: Tensor) -> Step:
    """The same, and put scale^T dw in the place of dw, and add dw z^T to ``sums``; the same bits every time.

    Args:
        z, w, scale: as in :func:`mixing`.
        above: as ``z``; first its first ``row_blocks`` planes are dw, then its first ``column_blocks`` what comes of
            it.
        sums: (:func:`ranges`, components, row_blocks, column_blocks) float32, added to; a program has one range of the
            tokens.
    """
    return _step([z, w, above, sums], scale, gradients=True)


def _step(tensors: list[Tensor], scale: Tensor, *, gradients: bool) -> Step:
    z, width = tensors[0], tensors[0].shape[2]
    components, *blocks = scale.shape
    tokens, parts = tile(blocks, width, z.element_size()), ranges(scale, width)
    rows, columns = blocks
    kernel = load(
        render(
            "blast_mixing",
            rows=rows,
            columns=columns,
            side_rows=side(rows),
            side_columns=side(columns),
            gradients=gradients,
            ragged=width % tokens > 0,
            interpreted=not z.is_cuda,
            bfloat16=z.dtype == torch.bfloat16,
        )
    ).blast_mixing
    constants = {"BT": tokens, "TILES": -(-width // (tokens * parts)), "RANGES": parts}
    arguments = [*tensors, scale.contiguous(), width // 8, components]
    launch = Launch(kernel, (components * parts,), constants, arguments, num_warps=WARPS, num_stages=STAGES)

    def step(_: int) -> None:
        with on_device(z.device):
            launch()

    return step

"""The launch of the template ``blast_mixing``: what each row of blocks has of each component, of what the columns give.

With the tokens along each component's row the product for a component p, s_p (row_blocks, column_blocks) times z_p
(column_blocks, tokens), has its operands as tensor cores take them, whatever the number of tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from structfly.lowering.block_products.chunks import Step, may_follow
from structfly.lowering.gemm import processors_of
from structfly.lowering.launch import Launch, on_device
from structfly.lowering.template import load, render

MOST_BLOCKS = 64
"""Along a side: a program has a tile of all of them."""
TILE = 128
"""Tokens of a tile, at most."""
_RESIDENT = 8  # programs that share a multiprocessor, so that one waits while another loads
WARPS, STAGES = 4, 3


def ranges(components: int, width: int, device: torch.device) -> int:
    """In how many ranges the tokens are cut, so that the processors have enough programs."""
    return max(1, min(width // tile(width), _RESIDENT * processors_of(device) // components))


def tile(width: int) -> int:
    """Tokens of a tile, where there are ``width``."""
    return min(TILE, width)


def mixing(held: Tensor, scale: Tensor) -> Step:
    """Put scale z in the place of z.

    Args:
        held: (planes, components, width), contiguous; first its first ``column_blocks`` planes are z, then its first
            ``row_blocks`` ones what comes of it.  The width is a power of two, or a multiple of ``TILE``.
        scale: (components, row_blocks, column_blocks).
    """
    return _step(held, [], scale)


def mixing_with_gradients(held: Tensor, above: Tensor, scale: Tensor, sums: Tensor) -> Step:
    """The same, and put scale^T dw in the place of dw, and add dw z^T to ``sums``; the same bits every time.

    Args:
        held, scale: as in :func:`mixing`.
        above: as ``held``; first its first ``row_blocks`` planes are dw, then its first ``column_blocks`` what comes of
            it.
        sums: (ranges, components, row_blocks, column_blocks) float32, added to; a program has one range of the tokens.
    """
    return _step(held, [above, sums], scale)


def _step(held: Tensor, with_gradients: list[Tensor], scale: Tensor) -> Step:
    _, components, width = held.shape
    _, rows, columns = scale.shape
    scale = scale.contiguous()
    following = may_follow(held.device)
    kernel = load(
        render(
            "blast_mixing",
            rows=rows,
            columns=columns,
            side_rows=side(rows),
            side_columns=side(columns),
            gradients=bool(with_gradients),
            interpreted=not held.is_cuda,
            bfloat16=held.dtype == torch.bfloat16,
            **following.parameters,
        )
    ).blast_mixing
    tokens = tile(width)
    parts = len(with_gradients[1]) if with_gradients else ranges(components, width, held.device)
    constants = {"BT": tokens, "TILES": -(-width // tokens // parts), "RANGES": parts}
    arguments = [held, *with_gradients, scale, width, components]
    options = {"num_warps": WARPS, "num_stages": STAGES, **following.options}
    launch = Launch(kernel, (components * parts,), constants, arguments, **options)

    def step(_: int) -> None:
        with on_device(held.device):
            launch()

    return step


def side(blocks: int) -> int:
    """Of a tile that holds so many blocks."""
    return max(16, 1 << (blocks - 1).bit_length())

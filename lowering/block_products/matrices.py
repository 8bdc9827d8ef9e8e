"""Launches of the templates ``matrix_products`` and ``matrix_gradients``: products with many matrices at once.

A side of a matrix may have two axes, a high and a low one, (high, low) in order, which one operand holds side by side
and another does not: so a permutation of features is where the one stores and the other loads.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor

from structfly.lowering.block_products.products import launch_product
from structfly.lowering.block_products.support import with_inner_side_last
from structfly.lowering.descriptor import descriptor, operand
from structfly.lowering.gemm import TORCH_MM, Library, Tiles
from structfly.lowering.template import Parameter


class Cut(NamedTuple):
    """How a side of two axes is cut in boxes that hold as many entries as a tile's side.

    Attributes:
        side: lengths of the high and the low axis.
        box: of one tile.
    """

    side: tuple[int, int]
    box: tuple[int, int]

    @classmethod
    def of(cls, high: int, low: int, width: int) -> Self:
        """Boxes of several high indices with all low ones where that fits, else of a run of low ones.

        In both cases what is beside a box in a row of side by side axes is in no box, or beyond the low axis.
        """
        several = high > 1 and low < width and not low & (low - 1)
        return cls((high, low), (width // low, low) if several else (1, width))

    @property
    def tiles(self) -> tuple[int, int]:
        """How many boxes there are along the high and the low axis."""
        high, low = (-(-size // part) for size, part in zip(self.side, self.box, strict=True))
        return high, low

    @property
    def in_one_run(self) -> bool:
        """Whether the boxes are one after another where the axes are side by side."""
        return self.side[0] == 1 or self.box[0] > 1 or self.side[1] % self.box[1] == 0


def matrix_products(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    tiles: Tiles,
    turned: bool = False,
    bias: Tensor | None = None,
    activation: str = "",
) -> None:
    """c[:, i] = a[:, i] b[i]^T + bias[i], or, if ``turned``, a[:, i] b[i].

    Args:
        a: (tokens, matrices, high K, low K), the last two side by side.
        b: (matrices, high N, low N, K), or if ``turned`` (matrices, high K, low K, N).
        c: (tokens, matrices, high N, low N), written.
        tiles: how the products are cut.
        bias: (matrices, low N), where high N is 1, or None.
        activation: of :data:`~structfly.lowering.activations.ACTIVATIONS`, applied to the float32 sums, or "".

    Raises:
        UnsupportedError: an operand's layout has no tensor descriptor.
    """
    tokens, matrices, n_high, n_low = c.shape
    if not c.numel():
        return
    if turned and b.dtype == torch.float32:
        b, turned = with_inner_side_last(b.flatten(1, 2)).unflatten(1, (n_high, n_low)), False
    # A run of K is cut as one axis, unless it is two of b's.
    k_high, k_low = a.shape[2:] if turned else (1, a.shape[2] * a.shape[3])
    n, k = Cut.of(n_high, n_low, tiles.n), Cut.of(k_high, k_low, tiles.k)
    part = (max(n.box[0] // tiles.parts, 1), min(n.box[1], tiles.part))
    parameters: dict[str, Parameter] = {
        "turned": turned,
        "bias": bias is not None,
        "activation": activation,
        "k_apart": not k.in_one_run,
        "n_side": n.side,
        "n_box": n.box,
        "n_tiles": n.tiles,
        "k_side": k.side,
        "k_box": k.box,
        "k_tiles": k.tiles,
        "part_box": part,
    }
    if k.in_one_run:
        of_a = operand(a.flatten(2).transpose(0, 1), 1, tiles.m, tiles.k)
    else:
        of_a = operand(a.permute(1, 2, 0, 3), 1, 1, tiles.m, tiles.k)
    of_b = operand(b, 1, *k.box, tiles.n) if turned else operand(b, 1, *n.box, tiles.k)
    written = descriptor(c.transpose(0, 1), 1, tiles.m, *part)
    count = -(-tokens // tiles.m) * matrices * n.tiles[0] * n.tiles[1]
    arguments = [written] if bias is None else [bias, written]
    launch_product("matrix_products", [of_a, of_b], arguments, (tokens, matrices, 0), count, parameters, tiles, a)


def matrix_gradients(a: Tensor, b: Tensor, c: Tensor, *, tiles: Tiles | Library) -> None:
    """c[i] = a[:, i]^T b[:, i], summed over the tokens.

    Args:
        a: (tokens, matrices, rows).
        b: (tokens, matrices, N).
        c: (matrices, high rows, low rows, N), written.
        tiles: how the products are cut, or that torch makes them.

    Raises:
        UnsupportedError: an operand's layout has no tensor descriptor.
    """
    matrices, m_high, m_low, side_n = c.shape
    if not c.numel():
        return
    if not len(a):
        c.zero_()
        return
    if tiles == TORCH_MM:
        c.copy_(torch.bmm(a.permute(1, 2, 0), b.transpose(0, 1)).view(c.shape))
        return
    m = Cut.of(m_high, m_low, tiles.m)
    parameters: dict[str, Parameter] = {"m_side": m.side, "m_box": m.box, "m_tiles": m.tiles}
    operands = [
        operand(a.transpose(0, 1), 1, tiles.k, tiles.m),
        operand(b.transpose(0, 1), 1, tiles.k, tiles.n),
    ]
    tall = matrices * m.tiles[0] * m.tiles[1]
    count = tall * -(-side_n // tiles.n)
    written = descriptor(c, 1, *m.box, tiles.part)
    sizes = (tall * tiles.m, side_n, len(a))
    launch_product("matrix_gradients", operands, [written], sizes, count, parameters, tiles, a)

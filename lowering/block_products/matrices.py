"""Launches of the templates ``matrix_products`` and ``matrix_gradients``: products with many matrices at once.

A side of a matrix may have two axes, a high and a low one, (high, low) in order, which one operand holds side by side
and another does not: so a permutation of features is where the one stores and the other loads.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, Self

import torch
from torch import Tensor

from structfly.lowering.block_products.ready import REMEMBERED, Ready, ready
from structfly.lowering.block_products.support import with_inner_side_last
from structfly.lowering.descriptor import Boxes, Form, form
from structfly.lowering.gemm import TORCH_MM, Library, Tiles, can_start_early
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
    if not c.numel():
        return
    if turned and b.dtype == torch.float32:
        b, turned = with_inner_side_last(b.flatten(1, 2)).unflatten(1, c.shape[2:]), False
    of_bias = None if bias is None else bias.dtype
    products = _products(form(a), form(b), form(c), tiles, turned, of_bias, activation)
    products(a, b, c) if bias is None else products(a, b, bias, c)


@lru_cache(maxsize=REMEMBERED)
def _products(
    of_a: Form, of_b: Form, of_c: Form, tiles: Tiles, turned: bool, of_bias: torch.dtype | None, activation: str
) -> Ready:
    """Products of tensors of such forms, in the order of the template's arguments."""
    a, b, c = of_a.like(), of_b.like(), of_c.like()
    tokens, matrices, n_high, n_low = c.shape
    # A run of K is cut as one axis, unless it is two of b's.
    k_high, k_low = a.shape[2:] if turned else (1, a.shape[2] * a.shape[3])
    n, k = Cut.of(n_high, n_low, tiles.n), Cut.of(k_high, k_low, tiles.k)
    part = (max(n.box[0] // tiles.parts, 1), min(n.box[1], tiles.part))
    parameters: dict[str, Parameter] = {
        "turned": turned,
        "bias": of_bias is not None,
        "activation": activation,
        "k_apart": not k.in_one_run,
        "n_side": n.side,
        "n_box": n.box,
        "n_tiles": n.tiles,
        "k_side": k.side,
        "k_box": k.box,
        "k_tiles": k.tiles,
        "part_box": part,
        # Of few tokens a launch takes little longer than another waits for it.  Of many, programs that start early may
        # come to share a multiprocessor while others have none.
        "waits": tokens <= tiles.m and can_start_early(of_a.device),
    }
    if k.in_one_run:
        runs = a.view(*a.shape[:2], a.shape[2] * a.shape[3])
        box_of_a = Boxes(runs.transpose(0, 1), (1, tiles.m, tiles.k), operand=True)
    else:
        box_of_a = Boxes(a.permute(1, 2, 0, 3), (1, 1, tiles.m, tiles.k), operand=True)
    box_of_b = Boxes(b, (1, *k.box, tiles.n) if turned else (1, *n.box, tiles.k), operand=True)
    written = Boxes(c.transpose(0, 1), (1, tiles.m, *part))
    takes = [box_of_a, box_of_b, *([] if of_bias is None else [None]), written]
    count = -(-tokens // tiles.m) * matrices * n.tiles[0] * n.tiles[1]
    sizes = (tokens, matrices, 0)
    return ready("matrix_products", takes, sizes, count, parameters, tiles, a.dtype, of_a.device)


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
    if not c.numel():
        return
    if not len(a):
        c.zero_()
        return
    if tiles == TORCH_MM:
        c.copy_(torch.bmm(a.permute(1, 2, 0), b.transpose(0, 1)).view(c.shape))
        return
    _gradients(form(a), form(b), form(c), tiles)(a, b, c)


@lru_cache(maxsize=REMEMBERED)
def _gradients(of_a: Form, of_b: Form, of_c: Form, tiles: Tiles) -> Ready:
    """Gradients of tensors of such forms."""
    a, b, c = of_a.like(), of_b.like(), of_c.like()
    matrices, m_high, m_low, side_n = c.shape
    m = Cut.of(m_high, m_low, tiles.m)
    parameters: dict[str, Parameter] = {"m_side": m.side, "m_box": m.box, "m_tiles": m.tiles}
    takes = [
        Boxes(a.transpose(0, 1), (1, tiles.k, tiles.m), operand=True),
        Boxes(b.transpose(0, 1), (1, tiles.k, tiles.n), operand=True),
        Boxes(c, (1, *m.box, tiles.part)),
    ]
    tall = matrices * m.tiles[0] * m.tiles[1]
    sizes = (tall * tiles.m, side_n, len(a))
    count = tall * -(-side_n // tiles.n)
    return ready("matrix_gradients", takes, sizes, count, parameters, tiles, a.dtype, of_a.device)

"""Gradients that are summed over calls of a product, in 20 bits.

The upper 16 bits of a float32 lie in the gradient's own memory, the next 4 in a plane beside it: what every addition
rounds has 1/256 of the variance of a rounding to bfloat16.  The last call rounds to bfloat16.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from structfly.lowering.gemm import IDLE, Blocks, Product, Rounds, Tiles
from structfly.lowering.linear_cross_entropy.schedule import low_stride
from structfly.lowering.template import Parameter


def new_plane(out: Tensor, tiles: Tiles) -> Tensor:
    """The bytes that stand beside ``out`` (M, N) bfloat16 where all that is added to it has these tiles."""
    rows, columns = out.shape if out.stride(1) == 1 else out.t().shape
    return torch.empty(rows * low_stride(columns, tiles), dtype=torch.uint8, device=out.device)


def sum_product(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    plane: Tensor,
    tiles: Tiles,
    *,
    rows: Literal["M", "K"],
    begins: Literal["zero", "rounded", "sums"],
    ends: Literal["never", "rows", "rows or second", "always"],
    beside: Rounds = IDLE,
    outer: tuple[Tensor, Tensor] | None = None,
) -> Product:
    """The product that adds ``a b`` to the sum in ``out`` (M, N) and ``plane``.

    A call takes how many rows count, on the device, and which of them is its first; where they lie along the inner
    dimension, also which row of ``b`` that is (0 if ``out`` lies transposed, for then they change places).

    Args:
        plane: of :func:`new_plane`, or any bytes that are as many.
        tiles: of every product that is added to the sum.
        rows: the dimension along which the rows lie: of ``out``, or the inner one.
        begins: with nothing, with the bfloat16 in ``out``, or with the sum so far.
        ends: in a later call, in the one that has the last row (but never in the first), or in this one.
        beside: with ``rows`` "K": the :attr:`~structfly.lowering.gemm.Product.rounds` of the product of the same rows
            that is launched before and runs beside.
        outer: vectors (M,) and (N,) in float32 whose outer product is taken off, or None.
    """
    if out.stride(1) != 1:  # it lies transposed, and so is what is made
        a, b, out, outer = b.t(), a.t(), out.t(), None if outer is None else outer[::-1]
    stride = low_stride(out.shape[1], tiles)
    low = plane[: len(out) * stride].view(-1, stride)
    arguments: list[Tensor | Blocks | int] = [Blocks(out.view(torch.uint16)), Blocks(low)]
    if rows == "K":
        arguments.extend((beside.height, beside.across, beside.work // tiles.step_work))
    arguments.extend(() if outer is None else outer)
    parameters: dict[str, Parameter] = {"rows": rows, "begins": begins, "ends": ends, "uniform": outer is not None}
    return Product("linear_cross_entropy_sum", a, b, arguments, parameters, tiles=tiles)

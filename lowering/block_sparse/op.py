"""``structfly::block_sparse_v3``: y = W x + bias for W made of blocks; see
:mod:`structfly.lowering.block_sparse.reference`.

With V_k the kept block k, in row r(k) and column c(k) of blocks, x_j and y_i the parts of x and y that belong to a
column and a row, and g the gradient with respect to y,

    y_i = sum over k with r(k) = i of V_k x_c(k),
    dx_j = sum over k with c(k) = j of V_k^T g_r(k),
    dV_k = g_r(k)^T x_c(k), summed over the tokens.

The first two are one computation.  On GPUs the products are generated where
:func:`~structfly.lowering.block_sparse.generated.why_not` has nothing against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from structfly.lowering.block_products.support import padded
from structfly.lowering.block_sparse import aten, generated
from structfly.lowering.block_sparse.layout import BlockLayout, Grid
from structfly.lowering.layer_op import LayerOp
from structfly.lowering.layer_products import Applied, is_traced


def _between(call: Applied) -> list[Tensor]:
    return []


def _finish(call: Applied, between: Sequence[Tensor]) -> Tensor:
    values, layout, grid = _read(call)
    x = padded(call.x, grid.columns * grid.block_in)
    if generated.why_not(values, call.tf32):
        y = aten.product(x, values, layout, grid)[:, : call.static[0]].contiguous()
        return y if call.bias is None else y.add_(call.bias)
    y = generated.product(x, values, layout, grid, bias=call.bias, activation=call.activation)
    return y[:, : call.static[0]].contiguous()


def _backward(grad: Tensor, call: Applied, between: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    values, layout, grid = _read(call)
    grad = padded(grad, grid.rows * grid.block_out)
    plain = is_traced(grad, call.x, values) or bool(generated.why_not(values, call.tf32))
    made: list[Tensor | None] = [None] * (1 + len(call.factors))
    # The blocks' gradients come first: what is held for their sums is free again when that of x is made.
    if wanted[1]:
        of_values = aten.gradient_of_values if plain else generated.gradient_of_values
        made[1] = of_values(grad, padded(call.x, grid.columns * grid.block_in), values, layout)
    if wanted[0]:
        of_x = aten.gradient_of_x if plain else generated.gradient_of_x
        made[0] = of_x(grad, values, layout, grid)[:, : call.x.shape[1]]
    return made


def _read(call: Applied) -> tuple[Tensor, BlockLayout, Grid]:
    values, layout = call.factors[0], BlockLayout(*call.factors[1:])
    return values, layout, Grid(layout.block_rows, call.static[1], values.shape[1], values.shape[2])


def _multiply_adds(rows: int, shapes: Sequence[Any], _: Sequence[int]) -> tuple[int, int]:
    blocks, block_out, block_in = shapes[0]
    return 0, rows * int(blocks) * int(block_out) * int(block_in)


BLOCK_SPARSE = LayerOp(
    "block_sparse_v3",
    between=_between,
    finish=_finish,
    backward=_backward,
    out_features=lambda _, static: static[0],
    kept_shapes=lambda *_: [],
    multiply_adds=_multiply_adds,
    adds_bias=True,
    why_no_epilogue=lambda call: generated.why_not(call.factors[0], call.tf32),
)
"""Takes ``values`` (nnz, block_out, block_in) and the tensors of a
:class:`~structfly.lowering.block_sparse.layout.BlockLayout`: ``columns``, and ``starts`` unless every row of blocks
keeps as many; static: out_features, and the columns of the grid of blocks."""

"""``structfly::block_sparse_low_rank_v3``: y = (B + U V^T) x + bias; see
:mod:`structfly.lowering.block_sparse_low_rank.reference`.

With z = V^T x and g the gradient with respect to y,

    dz = U^T g,    dU = g z^T,    dV^T = dz x^T,    dx = B^T g + V dz,

and B's own gradients are those of :mod:`structfly.lowering.block_sparse.op`.  Where products are generated, y and dx
are one each, to whose sums that of low rank is added before they are rounded, and the gradients of all factors are one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from structfly.lowering.block_products.gradients import LowRankGradients
from structfly.lowering.block_products.support import padded
from structfly.lowering.block_sparse import aten, generated
from structfly.lowering.block_sparse.layout import BlockLayout, Grid
from structfly.lowering.layer_op import LayerOp
from structfly.lowering.layer_products import Applied, is_traced


def _between(call: Applied) -> list[Tensor]:
    return [call.x @ call.factors[1].t()]


def _finish(call: Applied, between: Sequence[Tensor]) -> Tensor:
    (values, _, left), layout, grid = _read(call)
    x = padded(call.x, grid.columns * grid.block_in)
    if _why_not_one_product(values, left, grid, call.tf32):
        y = aten.product(x, values, layout, grid)[:, : len(left)].addmm(between[0], left.t())
        return y if call.bias is None else y.add_(call.bias)
    return generated.product(x, values, layout, grid, (between[0], left), call.bias, call.activation)


def _why_no_epilogue(call: Applied) -> str:
    (values, _, left), _, grid = _read(call)
    return _why_not_one_product(values, left, grid, call.tf32)


def _why_not_one_product(values: Tensor, left: Tensor, grid: Grid, tf32: bool) -> str:
    """Why y is not one generated product, or ""."""
    rows, (out_features, rank) = grid.rows * grid.block_out, left.shape
    if rows != out_features:
        return f"the grid has {rows} rows, and the product of low rank that is added has {out_features}"
    return generated.why_not(values, tf32, rank)


def _backward(grad: Tensor, call: Applied, between: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    (values, right, left), layout, grid = _read(call)
    (z,) = between
    made: list[Tensor | None] = [None] * (1 + len(call.factors))
    dz = grad @ left if wanted[0] or wanted[2] else None
    spread = padded(grad, grid.rows * grid.block_out)
    plain = is_traced(grad, call.x, values, right, left) or bool(generated.why_not(values, call.tf32, len(right)))
    # The factors' gradients come first: what is held for their sums is free again when that of x is made.
    x = padded(call.x, grid.columns * grid.block_in) if wanted[1] else call.x
    if wanted[1] and plain:
        made[1] = aten.gradient_of_values(spread, x, values, layout)
    elif wanted[1]:
        beside = None
        if dz is not None and wanted[2] and wanted[3]:
            of_left = grad.new_empty(grid.rows * grid.block_out, len(right))
            beside = LowRankGradients(dz, z, of_left, grad.new_empty(len(right), grid.columns * grid.block_in))
            made[2:4] = beside.right[:, : right.shape[1]], of_left[: len(left)]
        made[1] = generated.gradient_of_values(spread, x, values, layout, beside)
    if wanted[2] and made[2] is None and dz is not None:
        made[2] = dz.t() @ call.x
    if wanted[3] and made[3] is None:
        made[3] = grad.t() @ z
    if wanted[0] and dz is not None:
        if plain or grid.columns * grid.block_in != right.shape[1]:
            made[0] = aten.gradient_of_x(spread, values, layout, grid)[:, : right.shape[1]].addmm(dz, right)
        else:
            made[0] = generated.gradient_of_x(spread, values, layout, grid, (dz, right))
    return made


def _read(call: Applied) -> tuple[tuple[Tensor, Tensor, Tensor], BlockLayout, Grid]:
    values, right, left, *index = call.factors
    layout = BlockLayout(*index)
    return (values, right, left), layout, Grid(layout.block_rows, call.static[1], values.shape[1], values.shape[2])


def _multiply_adds(rows: int, shapes: Sequence[Any], _: Sequence[int]) -> tuple[int, int]:
    (blocks, block_out, block_in), (rank, in_features), (out_features, _), *_ = shapes
    kept = int(blocks) * int(block_out) * int(block_in)
    return rows * int(rank) * int(in_features), rows * (kept + int(rank) * int(out_features))


BLOCK_SPARSE_LOW_RANK = LayerOp(
    "block_sparse_low_rank_v3",
    between=_between,
    finish=_finish,
    backward=_backward,
    out_features=lambda _, static: static[0],
    kept_shapes=lambda rows, shapes, _: [(rows, shapes[1][0])],
    multiply_adds=_multiply_adds,
    adds_bias=True,
    why_no_epilogue=_why_no_epilogue,
)
"""Takes ``values`` (nnz, block_out, block_in), ``right`` (rank, in), ``left`` (out, rank), and the tensors of a
:class:`~structfly.lowering.block_sparse.layout.BlockLayout`; static: out_features, and the columns of the grid of
blocks."""

"""Block-sparse products generated for GPUs: every block in its place, nothing gathered; the same bits every time."""

from __future__ import annotations

from torch import Tensor

from structfly.lowering.block_products.gradient_places import Gradients
from structfly.lowering.block_products.gradients import LowRankGradients, block_gradients
from structfly.lowering.block_products.products import block_sums
from structfly.lowering.block_products.support import padded, why_no_products
from structfly.lowering.block_products.tiles import sum_cut
from structfly.lowering.block_sparse.layout import BlockLayout, Grid
from structfly.lowering.block_sparse.listing import by_columns, by_rows, of_gradients


def why_not(values: Tensor, tf32: bool, *ranks: int) -> str:
    """Why products of blocks like these (nnz, block_out, block_in) are not generated, or "".

    Args:
        tf32: as :func:`why_no_products` has it.
        ranks: of what is added to them.
    """
    return why_no_products(values, (*values.shape[1:], *ranks), tf32)


Thin = tuple[Tensor, Tensor] | None
"""A product of low rank that is added, (tokens, rank) with (features, rank) or (rank, features), or None."""


def product(
    x: Tensor,
    values: Tensor,
    layout: BlockLayout,
    grid: Grid,
    beside: Thin = None,
    bias: Tensor | None = None,
    activation: str = "",
) -> Tensor:
    """As :func:`structfly.lowering.block_sparse.aten.product`; ``beside`` has (features, rank), ``bias`` (features).

    ``activation`` is applied to the sums with both, before they are rounded.
    """
    tokens = len(x)
    y = x.new_empty(tokens, grid.rows, grid.block_out)
    source = x.view(tokens, grid.columns, grid.block_in)
    thin = beside and (beside[0], beside[1].view(grid.rows, grid.block_out, -1))
    if bias is not None:
        bias = padded(bias[None], grid.rows * grid.block_out).view(grid.rows, grid.block_out)
    members = by_rows(layout)
    cut = sum_cut(values, tokens, members, grid.block_out, grid.block_in)
    block_sums(source, values, y, members, beside=thin, bias=bias, activation=activation, cut=cut)
    return y.flatten(1)


def gradient_of_x(grad: Tensor, values: Tensor, layout: BlockLayout, grid: Grid, beside: Thin = None) -> Tensor:
    """As :func:`structfly.lowering.block_sparse.aten.gradient_of_x`; ``beside`` has (rank, features)."""
    tokens = len(grad)
    dx = grad.new_empty(tokens, grid.columns, grid.block_in)
    source = grad.view(tokens, grid.rows, grid.block_out)
    thin = beside and (beside[0], beside[1].view(-1, grid.columns, grid.block_in))
    members = by_columns(layout, grid.columns)
    cut = sum_cut(values, tokens, members, grid.block_in, grid.block_out, turned=True)
    block_sums(source, values, dx, members, turned=True, beside=thin, cut=cut)
    return dx.flatten(1)


def gradient_of_values(
    grad: Tensor, x: Tensor, values: Tensor, layout: BlockLayout, beside: LowRankGradients | None = None
) -> Tensor:
    """As :func:`structfly.lowering.block_sparse.aten.gradient_of_values`; ``beside`` is made in the same product."""
    _, block_out, block_in = values.shape
    made = values.new_empty(values.shape)
    of_rows, of_columns = grad.unflatten(1, (-1, block_out)), x.unflatten(1, (-1, block_in))
    rank = 0 if beside is None else beside.dz.shape[1]
    shape = Gradients(of_rows.shape[1], of_columns.shape[1], block_out, block_in, rank, values.element_size())
    block_gradients(of_rows, of_columns, made, of_gradients(layout, shape, len(x)), beside=beside)
    return made

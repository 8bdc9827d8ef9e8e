"""``structfly::blast_v4``: blocks U_i diag(s_ij) V_j; see :mod:`structfly.lowering.blast.reference`.

Three batches of products:

    z_j = V_j x_j^T (rank, N)           for every column block j,
    h_p = s_p z_p (row_blocks, N)       for every p below the rank, z_p (column_blocks, N),
    y_i = h_i^T U_i^T (N, out_block)    for every row block i, h_i (rank, N).

Nothing has the size row_blocks x column_blocks x N x rank.  With g_i (N, out_block) the gradient with respect to y_i,

    dU_i = g_i^T h_i^T,    dh_i = U_i^T g_i^T,
    ds_p = dh_p z_p^T,     dz_p = s_p^T dh_p,
    dV_j = dz_j x_j,       dx_j = dz_j^T V_j.

Kept is z; h is made of it again, by little work.  On GPUs all of this is generated where
:func:`~structfly.lowering.blast.generated.why_not` has nothing against it, and, where nothing is kept, made in chunks
of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from structfly.lowering.blast import aten, generated
from structfly.lowering.block_products.support import padded_rows
from structfly.lowering.layer_op import LayerOp
from structfly.lowering.layer_products import Applied, InChunks, Products, chosen

_BY_TORCH = Products(aten.between, aten.finish, aten.backward)
_GENERATED = Products(generated.between, generated.finish, generated.backward)


def _why_not(call: Applied) -> str:
    return generated.why_not(call.factors, call.tf32)


def _generated(call: Applied) -> Products | None:
    return None if _why_not(call) else _GENERATED


def _kept_shapes(rows: int, shapes: Sequence[Any], _: Sequence[int]) -> list[tuple[int, ...]]:
    column_blocks, rank, _ = shapes[0]
    return [(column_blocks, rank, padded_rows(rows))]


def _multiply_adds(rows: int, shapes: Sequence[Any], _: Sequence[int]) -> tuple[int, int]:
    right, scale, left = (rows * int(a) * int(b) * int(c) for a, b, c in shapes)
    return right, scale + left


BLAST = LayerOp(
    "blast_v4",
    **chosen(_generated, _BY_TORCH)._asdict(),
    out_features=lambda _, static: static[0],
    kept_shapes=_kept_shapes,
    multiply_adds=_multiply_adds,
    adds_bias=True,
    why_no_epilogue=_why_not,
    in_chunks=InChunks(_why_not, generated.backward_in_chunks, generated.forward_in_chunks),
)
"""Takes ``right`` (column_blocks, rank, in_block), ``scale`` (rank, row_blocks, column_blocks) and ``left``
(row_blocks, out_block, rank); static: out_features."""

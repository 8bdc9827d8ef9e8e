"""``structfly::blast_v1``: blocks U_i diag(s_ij) V_j; see :mod:`structfly.lowering.blast.reference`.

Three batches of products, every operand a view, with a row of tokens innermost where a batch is over the rank:

    z_j = V_j x_j^T (rank, N)           for every column block j,
    h_p = s_p z_p (row_blocks, N)       for every p below the rank, z_p (column_blocks, N),
    y_i = h_i^T U_i^T (N, out_block)    for every row block i, h_i (rank, N).

Nothing has the size row_blocks x column_blocks x N x rank.  With g_i (N, out_block) the gradient with respect to y_i,

    dU_i = g_i^T h_i^T,    dh_i = U_i^T g_i^T,
    ds_p = dh_p z_p^T,     dz_p = s_p^T dh_p,
    dV_j = dz_j x_j,       dx_j = dz_j^T V_j.

On GPUs, where nothing is kept and :func:`~structfly.lowering.blast.generated.why_not` has nothing against it, all of
this is made in chunks of tokens by generated products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from structfly.lowering.blast import generated
from structfly.lowering.layer_op import Applied, InChunks, LayerOp


def _blocks(rows: Tensor, blocks: int, width: int) -> Tensor:
    """(blocks, N, width) of (N, features): a view, but for features that do not fill the last block."""
    missing = blocks * width - rows.shape[1]
    padded = F.pad(rows, (0, missing)) if missing else rows
    return padded.view(len(rows), blocks, width).transpose(0, 1)


def _rows(blocks: Tensor, features: int) -> Tensor:
    """(N, features) of (blocks, N, width)."""
    count, rows, width = blocks.shape
    return blocks.transpose(0, 1).reshape(rows, count * width)[:, :features]


def _between(call: Applied) -> list[Tensor]:
    right, scale = call.factors[:2]
    z = right @ _blocks(call.x, len(right), right.shape[2]).mT
    return [z, scale @ z.transpose(0, 1)]


def _finish(call: Applied, between: Sequence[Tensor]) -> Tensor:
    y = _rows(between[1].permute(1, 2, 0) @ call.factors[2].mT, call.static[0]).contiguous()
    return y if call.bias is None else y.add_(call.bias)


def _backward(grad: Tensor, call: Applied, between: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    (right, scale, left), (z, h) = call.factors, between
    made: list[Tensor | None] = [None] * 4
    grads = _blocks(grad, len(left), left.shape[1])
    if wanted[3]:
        made[3] = grads.mT @ h.permute(1, 2, 0)
    if not any(wanted[:3]):
        return made
    dh = (left.mT @ grads.mT).transpose(0, 1)
    if wanted[2]:
        made[2] = dh @ z.permute(1, 2, 0)
    if not any(wanted[:2]):
        return made
    dz = (scale.mT @ dh).transpose(0, 1)
    if wanted[1]:
        made[1] = dz @ _blocks(call.x, len(right), right.shape[2])
    if wanted[0]:
        made[0] = _rows(dz.mT @ right, call.x.shape[1])
    return made


def _kept_shapes(rows: int, shapes: Sequence[Any], _: Sequence[int]) -> list[tuple[int, ...]]:
    (column_blocks, rank, _), (_, row_blocks, _), _ = shapes
    return [(column_blocks, rank, rows), (rank, row_blocks, rows)]


def _multiply_adds(rows: int, shapes: Sequence[Any], _: Sequence[int]) -> tuple[int, int]:
    right, scale, left = (rows * int(a) * int(b) * int(c) for a, b, c in shapes)
    return right + scale, left


BLAST = LayerOp(
    "blast_v1",
    between=_between,
    finish=_finish,
    backward=_backward,
    out_features=lambda _, static: static[0],
    kept_shapes=_kept_shapes,
    multiply_adds=_multiply_adds,
    adds_bias=True,
    in_chunks=InChunks(generated.why_not, generated.forward, generated.backward),
)
"""Takes ``right`` (column_blocks, rank, in_block), ``scale`` (rank, row_blocks, column_blocks) and ``left``
(row_blocks, out_block, rank); static: out_features."""

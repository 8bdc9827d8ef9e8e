"""Products with BLAST weights by torch: three batches of products, every operand a view.

Rows of tokens stand innermost where a batch is over the rank.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from structfly.lowering.block_products.support import padded_rows
from structfly.lowering.layer_products import Applied


def between(call: Applied) -> list[Tensor]:
    """z, padded as generated products keep it."""
    right = call.factors[0]
    z = right @ _blocks(call.x, len(right), right.shape[2]).mT
    missing = padded_rows(len(call.x)) - len(call.x)
    return [F.pad(z, (0, missing)) if missing else z]


def finish(call: Applied, between: Sequence[Tensor]) -> Tensor:
    """y."""
    h = _mixed(call, _of_tokens(call, between))
    y = _rows(h.permute(1, 2, 0) @ call.factors[2].mT, call.static[0]).contiguous()
    return y if call.bias is None else y.add_(call.bias)


def backward(grad: Tensor, call: Applied, between: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """The gradients that are wanted, of x and each factor."""
    (right, scale, left), z = call.factors, _of_tokens(call, between)
    made: list[Tensor | None] = [None] * 4
    grads = _blocks(grad, len(left), left.shape[1])
    if wanted[3]:
        made[3] = grads.mT @ _mixed(call, z).permute(1, 2, 0)
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


def _of_tokens(call: Applied, between: Sequence[Tensor]) -> Tensor:
    """z without what it is padded with."""
    return between[0][..., : len(call.x)]


def _mixed(call: Applied, z: Tensor) -> Tensor:
    """h (rank, row_blocks, N)."""
    return call.factors[1] @ z.transpose(0, 1)


def _blocks(rows: Tensor, blocks: int, width: int) -> Tensor:
    """(blocks, N, width) of (N, features): a view, but for features that do not fill the last block."""
    missing = blocks * width - rows.shape[1]
    padded = F.pad(rows, (0, missing)) if missing else rows
    return padded.view(len(rows), blocks, width).transpose(0, 1)


def _rows(blocks: Tensor, features: int) -> Tensor:
    """(N, features) of (blocks, N, width)."""
    count, rows, width = blocks.shape
    return blocks.transpose(0, 1).reshape(rows, count * width)[:, :features]

"""``structfly::low_rank_v3``: y = left (right x) + bias; see :mod:`structfly.lowering.low_rank.reference`.

With z = right x and g the gradient with respect to y,

    dleft = g^T z,    dz = g left,    dright = dz^T x,    dx = dz right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from structfly.lowering.layer_op import LayerOp
from structfly.lowering.layer_products import Applied


def _between(call: Applied) -> list[Tensor]:
    return [call.x @ call.factors[0].t()]


def _finish(call: Applied, between: Sequence[Tensor]) -> Tensor:
    left = call.factors[1].t()
    return between[0] @ left if call.bias is None else torch.addmm(call.bias, between[0], left)


def _backward(grad: Tensor, call: Applied, between: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    (right, left), (z,) = call.factors, between
    dz = grad @ left if wanted[0] or wanted[1] else None
    return [
        dz @ right if dz is not None and wanted[0] else None,
        dz.t() @ call.x if dz is not None and wanted[1] else None,
        grad.t() @ z if wanted[2] else None,
    ]


def _plain(x: Tensor, factors: Sequence[Tensor], bias: Tensor | None, _: Sequence[int]) -> Tensor:
    right, left = factors
    return F.linear(F.linear(x, right), left, bias)


def _multiply_adds(rows: int, shapes: Sequence[Any], _: Sequence[int]) -> tuple[int, int]:
    (rank, in_features), (out_features, _) = shapes
    return rows * int(rank) * int(in_features), rows * int(rank) * int(out_features)


LOW_RANK = LayerOp(
    "low_rank_v3",
    between=_between,
    finish=_finish,
    backward=_backward,
    out_features=lambda shapes, _: shapes[1][0],
    kept_shapes=lambda rows, shapes, _: [(rows, shapes[0][0])],
    multiply_adds=_multiply_adds,
    adds_bias=True,
    plain=_plain,
)
"""Takes ``right`` (rank, in) and ``left`` (out, rank)."""

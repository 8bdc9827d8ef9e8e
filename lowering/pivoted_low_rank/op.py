"""``structfly::pivoted_low_rank_v3``; see :mod:`structfly.lowering.pivoted_low_rank.reference`.

With z = pivots x, y = (z, mixing z) reordered, and (g, h) the gradient with respect to y put back into that order,

    dz = g + h mixing,    dmixing = h^T z,    dpivots = dz^T x,    dx = dz pivots.
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
    (z,), (mixing, order) = between, call.factors[1:]
    return torch.cat((z, z @ mixing.t()), 1).index_select(1, order)


def _backward(grad: Tensor, call: Applied, between: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    (pivots, mixing, order), (z,) = call.factors, between
    of_kept, of_mixed = grad.index_select(1, order.argsort()).split((len(pivots), len(mixing)), 1)
    dz = of_kept + of_mixed @ mixing if wanted[0] or wanted[1] else None
    return [
        dz @ pivots if dz is not None and wanted[0] else None,
        dz.t() @ call.x if dz is not None and wanted[1] else None,
        of_mixed.t() @ z if wanted[2] else None,
        None,
    ]


def _plain(x: Tensor, factors: Sequence[Tensor], bias: Tensor | None, _: Sequence[int]) -> Tensor:
    pivots, mixing, order = factors
    z = F.linear(x, pivots)
    y = torch.cat((z, F.linear(z, mixing)), -1).index_select(-1, order)
    return y if bias is None else y + bias


def _multiply_adds(rows: int, shapes: Sequence[Any], _: Sequence[int]) -> tuple[int, int]:
    (rank, in_features), (others, _), _ = shapes
    return rows * int(rank) * int(in_features), rows * int(rank) * int(others)


PIVOTED_LOW_RANK = LayerOp(
    "pivoted_low_rank_v3",
    between=_between,
    finish=_finish,
    backward=_backward,
    out_features=lambda shapes, _: shapes[2][0],
    kept_shapes=lambda rows, shapes, _: [(rows, shapes[0][0])],
    multiply_adds=_multiply_adds,
    plain=_plain,
)
"""Takes ``pivots`` (rank, in), ``mixing`` (out - rank, rank) and ``order`` (out,) int32."""

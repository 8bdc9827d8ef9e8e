"""FLOP formulas of the layers' ops for :class:`torch.utils.flop_counter.FlopCounterMode`.

A module of its own, imported when something is compiled: torch's flop counter imports triton, which importing
structfly must not do.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from structfly.lowering.blast.op import BLAST
from structfly.lowering.block_sparse.op import BLOCK_SPARSE
from structfly.lowering.block_sparse_low_rank.op import BLOCK_SPARSE_LOW_RANK
from structfly.lowering.gblr.op import GBLR
from structfly.lowering.kronecker.op import KRONECKER
from structfly.lowering.layer_op import LayerOp
from structfly.lowering.low_rank.op import LOW_RANK
from structfly.lowering.pivoted_low_rank.op import PIVOTED_LOW_RANK

LAYER_OPS: tuple[LayerOp, ...] = (
    LOW_RANK,
    PIVOTED_LOW_RANK,
    KRONECKER,
    BLOCK_SPARSE,
    BLOCK_SPARSE_LOW_RANK,
    BLAST,
    GBLR,
)


def _register(op: LayerOp) -> None:
    def forward(x: Any, factors: Any, bias: Any, static: Any, *_: Any, **__: Any) -> int:
        return 2 * sum(op.multiply_adds(_rows(x), factors, static))

    def backward(grad: Any, x: Any, factors: Any, kept: Any, static: Any, wanted: Any, *_: Any, **__: Any) -> int:
        between, rest = op.multiply_adds(_rows(x), factors, static)
        again = between if op.lacks(kept, _rows(x), factors, static) else 0
        return 2 * ((between + rest) * (bool(wanted[0]) + any(wanted[1:])) + again)

    register_flop_formula(getattr(torch.ops.structfly, op.name))(forward)
    register_flop_formula(getattr(torch.ops.structfly, f"{op.name}_backward"))(backward)


def _rows(shape: Any) -> int:
    return math.prod(map(int, shape[:-1]))


for _op in LAYER_OPS:
    _register(_op)

"""What the structures made of blocks share: their cost, and random blocks to train from scratch."""

from __future__ import annotations

import sympy
import torch
from torch import Tensor

from structfly.lowering.block_sparse.layout import Grid
from structfly.records.layer import TOKENS, LayerCost, LayerSizes, product


def cost_of_blocks(grid: Grid, blocks: int, indices: int, sizes: LayerSizes, dtype: torch.dtype) -> LayerCost:
    """Of a layer of so many blocks and integers that say where they stand."""
    parameters = blocks * grid.block_out * grid.block_in
    gathered = sympy.Rational(blocks, grid.rows) * grid.block_in
    return LayerCost(
        parameters=parameters,
        flops=2 * TOKENS * parameters,
        weight_bytes=parameters * dtype.itemsize + indices * torch.int32.itemsize,
        saved_bytes=0,
        transient_bytes=TOKENS * sizes.in_features * dtype.itemsize,  # the op gathers no more at a time
        stages=(product(gathered, grid.block_out, dtype, batch=grid.rows),),
    )


def random_values(kept: Tensor, grid: Grid, sizes: LayerSizes, generator: torch.Generator | None) -> Tensor:
    """Blocks (nnz, block_out, block_in) such that the weight's entries, zeros included, have variance 1 / (3 in)."""
    share = grid.spread(kept, sizes).float().mean()
    shape = (int(kept.sum()), grid.block_out, grid.block_in)
    return torch.randn(shape, generator=generator) / (3 * sizes.in_features * share).sqrt()

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
    width, height = grid.columns * grid.block_in, grid.rows * grid.block_out
    # The op gathers inputs for as many blocks at a time as the grid has columns, while it still holds those of the time
    # before, and puts these blocks side by side.  Input and output may be held once more with what reaches beyond W.
    held = min(2 * grid.columns, blocks) * grid.block_in
    turned = min(grid.columns, blocks) * grid.block_out * grid.block_in
    held += width if width > sizes.in_features else 0
    held += height if height > sizes.out_features else 0
    return LayerCost(
        parameters=parameters,
        flops=2 * TOKENS * parameters,
        weight_bytes=parameters * dtype.itemsize + indices * torch.int32.itemsize,
        saved_bytes=0,
        transient_bytes=(TOKENS * held + turned) * dtype.itemsize,
        stages=(product(gathered, grid.block_out, dtype, batch=grid.rows),),
    )


def random_values(kept: Tensor, grid: Grid, sizes: LayerSizes, generator: torch.Generator | None) -> Tensor:
    """Blocks (nnz, block_out, block_in) such that the weight's entries, zeros included, have variance 1 / (3 in)."""
    share = grid.spread(kept, sizes).float().mean()
    shape = (int(kept.sum()), grid.block_out, grid.block_in)
    return torch.randn(shape, generator=generator) / (3 * sizes.in_features * share).sqrt()

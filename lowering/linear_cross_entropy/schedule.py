"""What the schemes of the loss head take and whom they serve: for the run-time loop and for the planner."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from structfly.lowering.gemm import Tiles
from structfly.lowering.head.chunks import TILE_ROWS, row_stride
from structfly.lowering.head.epilogue import Epilogue
from structfly.lowering.head.linear import Wanted
from structfly.lowering.linear_cross_entropy.tiles import HeadTiles
from structfly.lowering.tuning.choice import INTERPRETED

# Of vectors over all rows: losses, coefficients, index and order, and what sorting takes; and what blocks keep of rows.
_ROW_BYTES, _KEPT_BYTES = 52, 20
# PyTorch's allocator on GPUs gives a large tensor up to 1 MiB more than it asks for; there are two, a buffer and a
# sum's lower plane.
_SPARE = 2 * 2**20


def why_no_exponentials(
    dtype: torch.dtype,
    hidden: int,
    epilogue: Epilogue,
    *,
    label_smoothing: float,
    adapter: bool,
    wanted: Wanted,
    statistics: bool,
) -> str:
    """Why the scheme "exponentials" does not serve a head, or ""; ``statistics``: something else than a loss is wanted
    of its rows."""
    if dtype != torch.bfloat16:
        return f"its logits are {dtype}; only bfloat16 has the range for exponentials"
    if hidden % 8:
        return f"its {hidden} hidden units are no multiple of 8, which tensor descriptors need"
    if label_smoothing and not epilogue.linear:
        return "label smoothing of logits that are capped or masked"
    if statistics:
        return "statistics of the rows are wanted beside their loss, or instead of it"
    if adapter:
        return "the logits are a sum of two products"
    late = epilogue.of_classes_after_leading(wanted.operands)
    return (
        f"its {late[0]} needs a gradient, and is more than added before slopes differ from class to class"
        if late
        else ""
    )


def why_no_blocks(epilogue: Epilogue) -> str:
    """Why the scheme "blocks" does not serve a head that "exponentials" does, or ""."""
    takes = epilogue.without_dead_classes[0].operands
    return "its pointwise chain takes a tensor, other than masks of classes at its end" if takes else ""


def bias_sum_bytes(classes: int, *, bias: bool) -> int:
    """Bytes of the sum that becomes the bias's gradient, if that is wanted."""
    return 4 * classes * bias


def exponentials_bytes(
    rows: int,
    length: int,
    hidden: int,
    classes: int,
    tiles: HeadTiles,
    *,
    wanted: Wanted,
    epilogue: Epilogue,
) -> int:
    """Bytes that the scheme "exponentials" takes besides inputs and gradients of ``rows``, ``length`` at a time.

    The exponentials themselves are stored only where a gradient is wanted.  Where none is, the planner keeps chunks
    within a few MiB by what this says of them alone.
    """
    stores = wanted.any
    exps = row_stride(classes) * torch.bfloat16.itemsize * stores
    across = -(-classes // (tiles.exponentials.n if stores else tiles.losses.n))
    kinds = [o.kind for o, want in zip(epilogue.operands, wanted.operands, strict=False) if want]
    over_rows = wanted.bias + kinds.count("class")
    by_row = len(kinds) - kinds.count("class")
    of_rows = sum(operand.kind == "row" for operand in epilogue.operands)
    vectors = 6 + of_rows + by_row + over_rows + (by_row + over_rows > 0)
    row = exps + hidden * 2 + 4 * (max(across * (1 + by_row), hidden * wanted.x) + vectors)
    stored = (hidden, classes) if tiles.transposed else (classes, hidden)
    fixed = rows * (_ROW_BYTES + 4 * by_row) + 4 * classes * over_rows if stores else 0
    fixed += _SPARE if stores and tiles.losses != INTERPRETED else 0
    return fixed + length * row + (stored[0] * low_stride(stored[1], tiles.weight_sum) if wanted.weight else 0)


def low_stride(columns: int, tiles: Tiles) -> int:
    """Bytes of a row of a sum's lower plane: a part of a tile and the next share theirs."""
    return -(-columns // (2 * tiles.part)) * tiles.part


def exponential_rows(rows: int, classes: int, workspace: int) -> int:
    """Rows of exponentials that fit in ``workspace`` bytes, at least 1; whole tiles where there are some.

    They are not evened out over the chunks: how many rows count is known on the device alone, and a length may have
    been chosen for how its products fill the device.
    """
    fit = workspace // (row_stride(classes) * torch.bfloat16.itemsize)
    return max(1, min(rows, fit - fit % TILE_ROWS if fit >= TILE_ROWS else fit))


@dataclass(frozen=True)
class BlockSizes:
    """How the scheme "blocks" cuts the logits.

    Attributes:
        rows, classes: of a block, in whole tiles.
        beside: classes of a block that shares its memory with the hidden states of its rows.
        bytes: what it takes besides inputs and gradients.
    """

    rows: int
    classes: int
    beside: int
    bytes: int


# Steps along the inner dimension that a tile's end is worth, of a sum, which reads and writes its planes, and of a
# block, which has the loss; and a launch.
_SUM_STEPS, _BLOCK_STEPS, _LAUNCH_STEPS = 13, 8, 13
# How many widths of blocks, in tiles, are tried below the largest.
_TRIED = 16


@lru_cache(maxsize=256)
def block_sizes(rows: int, hidden: int, classes: int, limit: int, *, processors: int, tiles: HeadTiles) -> BlockSizes:
    """The fastest block that takes no more than ``limit`` bytes, or where none does, one of at most 8 by 8 tiles.

    Many rows make few sums of dW, many classes few sums of dx, and the tiles of each product should fill the
    processors.
    """
    block, of_dx, of_dw = tiles.block, tiles.block_hidden_sum, tiles.block_weight_sum
    tall, wide = tiles.block_rows, tiles.block_classes
    dx_low, dw_low = low_stride(hidden, of_dx), low_stride(hidden, of_dw)
    spare = 0 if block == INTERPRETED else _SPARE

    def bytes_of(m: int, n: int) -> int:
        statistics = m * (2 * hidden + 4 * -(-classes // tiles.losses.n) + 24)
        sums = 2 * m * max(n, hidden + beside(n)) + rows * dx_low + n * dw_low
        return spare + rows * (_ROW_BYTES + _KEPT_BYTES) + max(statistics, sums)

    def beside(n: int) -> int:
        return max(wide, (n - hidden) // wide * wide)

    def steps_of(m: int, n: int) -> float:
        """In steps of a block's tile."""
        dw_sides = (hidden, n) if tiles.transposed else (n, hidden)
        products = (
            (block, m, n, hidden / block.k + _BLOCK_STEPS),
            (of_dx, m, hidden, n / of_dx.k + _SUM_STEPS),
            (of_dw, *dw_sides, m / of_dw.k + _SUM_STEPS),
        )
        work = 0.0
        for cut, height, width, steps in products:
            count = -(-height // cut.m) * -(-width // cut.n)
            work += -(-count // processors) * steps * cut.step_work / block.step_work + _LAUNCH_STEPS
        return rows / m * -(-classes // n) * work

    fits = []
    for m in range(tall, min(_whole(rows, tall), 64 * tall) + 1, tall):
        most = min(
            (limit - spare - rows * (_ROW_BYTES + _KEPT_BYTES + dx_low)) // (2 * m + dw_low), _whole(classes, wide)
        )
        most = most // wide * wide
        fewest = max(wide, most - _TRIED * wide)  # fewer cost more, but for how their tiles fill the processors
        fits += [(m, n) for n in range(fewest, most + 1, wide) if bytes_of(m, n) <= limit]
    small = min(8 * tall, _whole(rows, tall)), min(8 * wide, _whole(classes, wide))
    m, n = min(fits, key=lambda fit: steps_of(*fit), default=small)
    return BlockSizes(m, n, beside(n), bytes_of(m, n))


def _whole(size: int, tile: int) -> int:
    """The least multiple of ``tile`` that is no less."""
    return -(-size // tile) * tile


def gradient_scale(dtype: torch.dtype) -> float:
    """A power of two that keeps probabilities around 1/V normal numbers in the logits' dtype."""
    return 2.0**11 if dtype == torch.float16 else 1.0

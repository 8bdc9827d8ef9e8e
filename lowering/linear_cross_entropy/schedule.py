"""What the schemes of the loss head take and whom they serve: for the run-time loop and for the planner."""

from __future__ import annotations

from dataclasses import replace

import torch

from structfly.lowering.gemm import HOPPER, INTERPRETED, Tiles
from structfly.lowering.head.chunks import TILE_ROWS, row_stride
from structfly.lowering.head.epilogue import Epilogue


def why_no_exponentials(
    dtype: torch.dtype,
    hidden: int,
    epilogue: Epilogue,
    *,
    label_smoothing: float,
    adapter: bool,
    bias_gradient: bool,
    statistics: bool,
) -> str:
    """Why the scheme "exponentials" does not serve a head, or ""; ``statistics``: something else than a loss is wanted
    of its rows."""
    if dtype != torch.bfloat16:
        return f"its logits are {dtype}; only bfloat16 has the range for exponentials"
    if hidden % 8:
        return f"its {hidden} hidden units are no multiple of 8, which tensor descriptors need"
    if epilogue.without_dead_classes()[0].operands:
        return "its pointwise chain takes a tensor, other than masks of classes at its end"
    if label_smoothing and not epilogue.linear:
        return "label smoothing of logits that are capped or masked"
    if statistics:
        return "statistics of the rows are wanted beside their loss, or instead of it"
    if adapter:
        return "the logits are a sum of two products"
    return "the bias needs a gradient" if bias_gradient else ""


def exponentials_bytes(length: int, hidden: int, classes: int, *, dx: bool, dw: bool) -> int:
    """Bytes that the scheme "exponentials" takes besides inputs and gradients, in chunks of ``length`` rows.

    The exponentials themselves are stored only where a gradient is wanted.
    """
    exps = row_stride(classes) * torch.bfloat16.itemsize * (dx or dw)
    row = exps + hidden * (2 + 4 * dx) + 4 * (-(-classes // HOPPER.n) + 6)
    return length * row + (classes * low_stride(hidden) if dw else 0)


# A sum's tile is taken in two parts, so that what its epilogue reads comes in few pieces, each of which it waits for.
WEIGHT_TILES = {"cuda": replace(HOPPER, group=4, parts=2), "cpu": INTERPRETED}


def low_stride(columns: int, tiles: Tiles = WEIGHT_TILES["cuda"]) -> int:
    """Bytes of a row of the weight gradient's lower plane: a part of a tile and the next share theirs."""
    return -(-columns // (2 * tiles.part)) * tiles.part


def exponential_rows(rows: int, classes: int, workspace: int) -> int:
    """Rows of exponentials that fit in ``workspace`` bytes, at least 1; whole tiles where there are some.

    They are not evened out over the chunks: how many rows count is known on the device alone, and a length may have
    been chosen for how its products fill the device.
    """
    fit = workspace // (row_stride(classes) * torch.bfloat16.itemsize)
    return max(1, min(rows, fit - fit % TILE_ROWS if fit >= TILE_ROWS else fit))


def gradient_scale(dtype: torch.dtype) -> float:
    """A power of two that keeps probabilities around 1/V normal numbers in the logits' dtype."""
    return 2.0**11 if dtype == torch.float16 else 1.0

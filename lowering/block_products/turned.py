"""Features of two axes in the other order: the copy that outputs need that stand apart."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from structfly.lowering.gemm import kernel_of
from structfly.lowering.launch import Launch, on_device

_SIDE, _TILE = 64, 8192  # numbers of a tile's side at most, and of a tile


def turned(features: Tensor) -> Tensor:
    """A contiguous copy of features (N, A, B) as (N, B, A).

    Runs of both are read and written whole, where a copy by torch has runs of the one alone.

    Args:
        features: (N, A, B) contiguous, of any dtype, fewer than 2^31 in a row.
    """
    rows, a, b = features.shape
    made = features.new_empty(rows, b, a)
    if features.numel():
        tile = _tile(a, b)
        programs = -(-rows // tile.rows) * -(-a // tile.a) * -(-b // tile.b)
        constants = {"ROWS": tile.rows, "TILE_A": tile.a, "TILE_B": tile.b}
        launch = Launch(kernel_of("turned_features", ()), (programs,), constants, num_warps=4)
        with on_device(features.device):
            launch(features, made, rows, a, b)
    return made


class _Tile(NamedTuple):
    rows: int
    a: int
    b: int


@lru_cache(maxsize=256)
def _tile(a: int, b: int) -> _Tile:
    """A tile of powers of two, whose sides are no longer than needed."""
    side_a, side_b = (min(1 << (side - 1).bit_length(), _SIDE) for side in (a, b))
    return _Tile(max(1, _TILE // (side_a * side_b)), side_a, side_b)

"""What identifies a generated product, as far as the choice of its tiles goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from structfly.records import DeviceModel

Layout = Literal["nn", "nt", "tn", "tt"]


@dataclass(frozen=True)
class Kind:
    """The products of one template.

    Attributes:
        hooks: those that a product may have.
        whole_bytes: of an entry of a tile that the epilogue stores whole, in shared memory.
        part_bytes: of an entry of a part of a tile that the epilogue has in shared memory at a time.
        fewest_parts: of a tile.
        rows_at_least: of a tile.
        step_at_most: along the inner dimension.
        torch_mm: whether torch.mm can make it: the epilogue does no more than store.
    """

    hooks: tuple[str, ...]
    whole_bytes: int = 0
    part_bytes: int = 0
    fewest_parts: int = 1
    rows_at_least: int = 16
    step_at_most: int = 256
    torch_mm: bool = False


# The rows of a chunk that count end anywhere.  A tile of exponentials, or of a block, writes zeros to its end; a sum
# along the rows reads to the end of its step.  So that it reads nothing older, the steps divide the tiles: both are
# powers of two, the ones no larger than this, the others no smaller.
_ZEROED_ROWS = 64

# What a sum has of a part at a time: 16 bits of either half in one piece, 4 bits of both in another.
KINDS = {
    "linear_cross_entropy_exponentials": Kind(("stored", "nonlinear"), whole_bytes=2, rows_at_least=_ZEROED_ROWS),
    "linear_cross_entropy_hidden": Kind(("every row",), part_bytes=4, torch_mm=True),
    "linear_cross_entropy_sum": Kind(("rows inside",), part_bytes=5, fewest_parts=2, step_at_most=_ZEROED_ROWS),
    "linear_cross_entropy_block": Kind(("nonlinear",), whole_bytes=2, rows_at_least=_ZEROED_ROWS),
}


@dataclass(frozen=True)
class ProductClass:
    """Products C (M, N) = A (M, K) B (K, N) that are cut alike.

    Attributes:
        template: one of :data:`KINDS`.
        hooks: those of its kind's that it has: "stored" keeps the exponentials, "nonlinear" has a pointwise chain
            whose slope is not the same for all classes of a row, "rows inside" sums along the rows, "every row" leaves
            none out.
        dtype: of the operands, as torch names it.
        layout: "n" or "t" for either operand: rows or columns contiguous.
        m, n, k: the sizes rounded up to powers of two; None along rows or classes of which the caller takes as many at
            a time as suit the tiles, so that the choice depends on no number of tokens.
    """

    device: DeviceModel
    template: str
    hooks: tuple[str, ...]
    dtype: str
    layout: Layout
    m: int | None
    n: int | None
    k: int | None


def size_class(size: int) -> int:
    """The least power of two that is no less."""
    return 1 << max(size - 1, 0).bit_length()

"""The eager reference, which is the op's specification."""

from __future__ import annotations

from torch import Tensor

from structfly.lowering.gblr.tile_products import dense_of


def gblr_reference(
    x: Tensor,
    right: Tensor,
    right_index: Tensor,
    left: Tensor,
    left_index: Tensor,
    order: Tensor,
    bias: Tensor | None,
    out_features: int,
) -> Tensor:
    """y = sum over i of L[:, order[i]] (R[:, i]^T x), + bias: L (out, groups * group) and R (in, groups * group) are
    tile-sparse, and each has its components in an order of its own, that in which they need fewest tiles.

    Args:
        x: (*rows, in).
        right: (right_tiles, tile, group), R's tiles.
        right_index: (2, right_tiles) int32, the group and the tile of inputs where each stands.
        left: (left_tiles, tile, group), L's tiles.
        left_index: (2, left_tiles) int32, the group and the tile of outputs where each stands.
        order: (groups * group,) int32, a permutation: which column of L belongs to each of R.
        bias: (out_features,), or None.
        out_features: W's rows; rows of the last tile beyond W's are left out, as are those of R beyond in.

    Returns:
        (*rows, out_features).
    """
    groups = len(order) // right.shape[2]
    components = x @ dense_of(right, right_index, x.shape[-1], groups)
    y = components @ dense_of(left, left_index, out_features, groups)[:, order].t()
    return y if bias is None else y + bias

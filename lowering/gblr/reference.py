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
    bias: Tensor | None,
    out_features: int,
    groups: int,
) -> Tensor:
    """y = L (R^T x) + bias with two tile-sparse matrices, L (out, groups * group) and R (in, groups * group).

    Args:
        x: (*rows, in).
        right: (right_tiles, tile, group), R's tiles.
        right_index: (2, right_tiles) int32, the group and the tile of inputs where each stands.
        left: (left_tiles, tile, group), L's tiles.
        left_index: (2, left_tiles) int32, the group and the tile of outputs where each stands.
        bias: (out_features,), or None.
        out_features: W's rows; rows of the last tile beyond W's are left out, as are those of R beyond in.
        groups: of components.

    Returns:
        (*rows, out_features).
    """
    components = x @ dense_of(right, right_index, x.shape[-1], groups)
    y = components @ dense_of(left, left_index, out_features, groups).t()
    return y if bias is None else y + bias

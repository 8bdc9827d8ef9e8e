"""The specification of the op: plain, differentiable PyTorch.  Every lowering computes this function."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from structfly.lowering.head.reference import logits_reference


def linear_cross_entropy_reference(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    row_weight: Tensor | None = None,
    adapter_x: Tensor | None = None,
    adapter_weight: Tensor | None = None,
    adapter_scale: float = 1.0,
    epilogue: str = "",
    operands: Sequence[Tensor] = (),
    num_classes: int | None = None,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of ``epilogue(x weight^T + adapter_scale adapter_x adapter_weight^T + bias)`` against ``target``.

    Args:
        x: (N, H) hidden states.
        weight: (V, H) rows are classes.
        target: (N,) int64 in [0, num_classes), or ``ignore_index``.
        bias: (V,).
        class_weight: (num_classes,) weight of each class, as in :func:`torch.nn.functional.cross_entropy`.
        row_weight: (N,) weight of each row's loss; only with ``reduction="sum"``.
        adapter_x, adapter_weight: (N, R) and (V, R), a low-rank update of the logits.
        epilogue: pointwise steps, as in :mod:`structfly.lowering.head.epilogue`.
        operands: the tensors that the epilogue names: () a scalar, (N,) one number a row, (num_classes,) one a class;
            conditions are bool, all others of any floating-point dtype.
        num_classes: the first so many classes count, None for all V.
        ignore_index: rows with this target are left out; None if no value is ignored.
        reduction: "none", "sum" or "mean".

    Returns:
        () loss, or (N,) losses for "none".
    """
    classes = weight.shape[0] if num_classes is None else num_classes
    logits = logits_reference(
        x,
        weight,
        bias,
        classes,
        adapter_x=adapter_x,
        adapter_weight=adapter_weight,
        adapter_scale=adapter_scale,
        epilogue=epilogue,
        operands=operands,
    )
    losses = F.cross_entropy(
        logits,
        target,
        weight=None if class_weight is None else class_weight.to(logits.dtype),
        ignore_index=_UNUSED if ignore_index is None else ignore_index,
        label_smoothing=label_smoothing,
        reduction="none" if reduction == "sum" else reduction,
    )
    if reduction != "sum":
        return losses
    return losses.sum() if row_weight is None else (losses * row_weight).sum()


# A value no valid target has, for F.cross_entropy, which always ignores one.
_UNUSED = -(2**62)

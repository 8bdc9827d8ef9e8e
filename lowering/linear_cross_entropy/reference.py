"""The specification of the op: plain, differentiable PyTorch.  Every lowering computes this function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from structfly.lowering.head.reference import logits_reference
from structfly.lowering.linear_cross_entropy.row_program import parse_row_program
from structfly.lowering.linear_cross_entropy.rows import RowStatistics


class HeadValues(NamedTuple):
    """What a head's rows give; None for what was not asked for.

    Attributes:
        loss: () loss, or (N,) losses for the reduction "none".
        losses: (N,) losses beside a reduced loss, without gradient.
        lse: (N,) log-sum-exp of the row's logits.
        entropy: (N,) -sum_v p_v log p_v of their softmax p, in which a logit of -inf counts 0.
        argmax: (N,) int64, the class of the largest logit: of equal ones the first, of NaNs the first.
        chosen: (N, K) the logits of further classes.
    """

    loss: Tensor | None
    losses: Tensor | None
    lse: Tensor | None
    entropy: Tensor | None
    argmax: Tensor | None
    chosen: Tensor | None


def linear_cross_entropy_reference(
    x: Tensor,
    weight: Tensor,
    target: Tensor | None,
    *,
    choices: Tensor | None = None,
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
    statistics: Sequence[str] = (),
    row_loss: str = "",
    row_operands: Sequence[Tensor] = (),
    row_group: Sequence[int] = (),
) -> HeadValues:
    """Cross-entropy of ``epilogue(x weight^T + adapter_scale adapter_x adapter_weight^T + bias)`` against ``target``,
    and other statistics of the rows of these logits.

    Args:
        x: (N, H) hidden states.
        weight: (V, H) rows are classes.
        target: (N,) int64 in [0, num_classes), or ``ignore_index``; None if no loss is wanted.
        choices: (N, K) int64 in [0, num_classes): the classes of ``chosen``.
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
        statistics: names of further fields of :class:`HeadValues` that are wanted.
        row_loss: a program that makes the loss of each row or group of rows of their statistics, instead of the
            cross-entropy; only with ``reduction="sum"``, see
            :mod:`~structfly.lowering.linear_cross_entropy.row_program`.
        row_operands: what the program takes besides.
        row_group: the shape of a group, whose rows follow one another; () for single rows.
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
    lse, p = logits.logsumexp(1), logits.softmax(1)
    log_p = torch.where(p > 0, logits - lse.unsqueeze(1), 0.0)
    argmax = logits.argmax(1)
    values: dict[str, Tensor] = {"lse": lse, "entropy": -(p * log_p).sum(1), "argmax": argmax}
    if choices is not None:
        values["chosen"] = logits.gather(1, choices)
    loss = None
    if target is not None:

        def cross_entropy(reduction: str) -> Tensor:
            return F.cross_entropy(
                logits,
                target,
                weight=None if class_weight is None else class_weight.to(logits.dtype),
                ignore_index=_UNUSED if ignore_index is None else ignore_index,
                label_smoothing=label_smoothing,
                reduction=reduction,
            )

        losses = loss = cross_entropy("none")
        values["losses"] = losses.detach()
        if reduction == "mean":
            loss = cross_entropy("mean")
        elif reduction == "sum":
            loss = losses.sum() if row_weight is None else (losses * row_weight).sum()
    if row_loss:
        found = RowStatistics(None if target is None else losses, lse, values["entropy"], argmax, values.get("chosen"))
        loss = parse_row_program(row_loss).run(found, row_operands, row_group).sum()
    return HeadValues(loss, *(values[name] if name in statistics else None for name in HeadValues._fields[1:]))


# A value no valid target has, for F.cross_entropy, which always ignores one.
_UNUSED = -(2**62)

"""The specification of the op: plain, differentiable PyTorch.  Every lowering computes this function."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from structfly.lowering.head.epilogue import parse_epilogue
from structfly.lowering.head.reference import logits_reference


def linear_divergence_reference(
    x: Tensor,
    weight: Tensor,
    *,
    kind: str,
    bias: Tensor | None = None,
    adapter_x: Tensor | None = None,
    adapter_weight: Tensor | None = None,
    adapter_scale: float = 1.0,
    epilogue: str = "",
    teacher: Tensor | None = None,
    teacher_form: str = "logits",
    teacher_x: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_epilogue: str = "",
    row_weight: Tensor | None = None,
    num_classes: int | None = None,
    beta: float = 0.5,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """A divergence of the student's distribution p from the teacher's q, per row.

    p is the softmax of ``epilogue(x weight^T + adapter_scale adapter_x adapter_weight^T + bias)``.  q is the softmax of
    ``teacher_epilogue(teacher_x teacher_weight^T + teacher_bias)``, or is given as ``teacher``.

        "cross_entropy"   -sum_v q'_v log p_v,  q' = (1 - label_smoothing) q + label_smoothing / C
        "forward_kl"      sum_v q_v (log q_v - log p_v)
        "reverse_kl"      sum_v p_v (log p_v - log q_v)
        "jsd"             beta sum_v q_v (log q_v - log m_v) + (1 - beta) sum_v p_v (log p_v - log m_v),
                          m = beta q + (1 - beta) p: generalised Jensen-Shannon (Agarwal et al. 2024)

    A factor 0 makes its product 0, whatever the logarithm: 0 log 0 = 0, as in :func:`torch.nn.functional.kl_div`.

    Args:
        x: (N, H) hidden states.
        weight: (V, H) rows are classes.
        kind: one of the above.
        bias: (V,).
        adapter_x, adapter_weight: (N, R) and (V, R), a low-rank update of the student's logits.
        teacher: (N, C) logits, probabilities or log-probabilities.
        teacher_form: "logits", "probabilities" or "log_probabilities"; neither of the latter need sum to 1.
        teacher_x, teacher_weight, teacher_bias: (N, G), (U, G) and (U,), instead of ``teacher``.
        teacher_epilogue: of the teacher's logits, given or made.
        row_weight: (N,) weight of each row; only with ``reduction="sum"``.
        num_classes: C, the first so many classes of both count; None for all of the student's.
        beta: the teacher's share of the mixture, in (0, 1).
        reduction: "none", "sum" or "mean" (over rows).

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
    )
    log_p = F.log_softmax(logits, 1)
    p = log_p.exp()
    if teacher_x is not None and teacher_weight is not None:
        teacher_form = "logits"
        teacher = logits_reference(teacher_x, teacher_weight, teacher_bias, classes)
    assert teacher is not None
    if teacher_form == "probabilities":
        q, log_q = teacher, teacher.log()
    elif teacher_form == "log_probabilities":
        q, log_q = teacher.exp(), teacher
    else:
        log_q = F.log_softmax(parse_epilogue(teacher_epilogue).apply(teacher, ()), 1)
        q = log_q.exp()
    if kind == "cross_entropy":
        losses = -_times((1 - label_smoothing) * q + label_smoothing / classes, log_p).sum(1)
    elif kind == "forward_kl":
        losses = _times(q, log_q - log_p).sum(1)
    elif kind == "reverse_kl":
        losses = _times(p, log_p - log_q).sum(1)
    else:
        log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))
        losses = beta * _times(q, log_q - log_m).sum(1) + (1 - beta) * _times(p, log_p - log_m).sum(1)
    if row_weight is not None:
        losses = losses * row_weight
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.mean()


def _times(factor: Tensor, logarithm: Tensor) -> Tensor:
    """``factor * logarithm``, and 0 where the factor is 0; neither is differentiated there."""
    zero = factor == 0
    return torch.where(zero, 0.0, factor * torch.where(zero, 0.0, logarithm))

"""The row step of the chunked divergence: from a chunk of the student's logits, and the teacher's rows beside it, to
divergences and, in place, to their gradient.

For one row with raw student logits z (float32), bias b, chain f, row coefficient c, over C classes:

    u_v   = f(z_v + b_v),    log p_v = u_v - log sum_w exp(u_w)
    log q_v, q_v             from the teacher's row: logits (with a bias and a chain of their own), probabilities, or
                             log-probabilities; q is constant and need not sum to 1 where it is given

The gradients with respect to u, then dz_v = c f'(z_v + b_v) du_v.  With d log p_w / du_v = [v = w] - p_v:

    "cross_entropy"  L = -sum_w q_w log p_w, with q smoothed to (1 - s) q + s / C
    "forward_kl"     L = sum_w q_w (log q_w - log p_w)
        both:        du_v = -sum_w q_w ([v = w] - p_v) = (sum_w q_w) p_v - q_v

For a function L(p), du_v = p_v (g_v - sum_w p_w g_w) with g = dL/dp, since dp_w / du_v = p_w ([v = w] - p_v).
A constant added to g changes nothing.

    "reverse_kl"     L = sum_w p_w (log p_w - log q_w),   g_v = log p_v - log q_v + 1
                     du_v = p_v (log p_v - log q_v - L)

    "jsd"            L = beta sum_w q_w (log q_w - log m_w) + (1 - beta) K,   K = sum_w p_w (log p_w - log m_w),
                     m = beta q + (1 - beta) p
                     g_v = -beta q_v (1 - beta) / m_v + (1 - beta) (log p_v - log m_v + 1 - p_v (1 - beta) / m_v)
                         = (1 - beta) (log p_v - log m_v + 1 - m_v / m_v) = (1 - beta) (log p_v - log m_v)
                     du_v = (1 - beta) p_v (log p_v - log m_v - K)

Where q_v or p_v is 0 its product with a logarithm is 0.  A row with c = 0 has loss 0 and dz 0.  The returned losses do
not carry c.  dz is multiplied by ``gradient_scale``, a power of two that keeps float16 normal, before it is rounded to
the logits' dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from structfly.lowering.head.epilogue import Epilogue

KINDS = ("cross_entropy", "forward_kl", "reverse_kl", "jsd")
TEACHER_FORMS = ("logits", "probabilities", "log_probabilities")


@dataclass(frozen=True)
class RowTerms:
    """What is the same for every row.

    Attributes:
        kind: one of ``KINDS``.
        beta: the teacher's share of the mixture, in (0, 1); only read for "jsd".
        label_smoothing: s in [0, 1], 0 but for "cross_entropy".
        epilogue, bias: the student's chain f, and (C,) b in any float dtype, or None.
        teacher_form: what the teacher's rows hold, one of ``TEACHER_FORMS``.
        teacher_epilogue, teacher_bias: the same of a teacher of logits; the empty chain and None for the others.
        gradient_scale: power of two applied to dz.
    """

    kind: str
    beta: float
    label_smoothing: float
    epilogue: Epilogue
    bias: Tensor | None
    teacher_form: str
    teacher_epilogue: Epilogue
    teacher_bias: Tensor | None
    gradient_scale: float


class RowStep(Protocol):
    """Turns the student's logits into divergences and, where asked, into dz in place.

    Args:
        logits: (R, C), unit column stride, any row stride, overwritten: by dz if ``gradient``, else by scratch values.
        teacher: (R, C), unit column stride, any row stride, any float dtype; only read.
        coefficient: (R,) c in the accumulation dtype, or None for ones.
        terms: what all rows share.
        gradient: whether dz is wanted.

    Returns:
        (R,) losses in the accumulation dtype: float32, float64 for float64 logits.
    """

    def __call__(
        self, logits: Tensor, teacher: Tensor, coefficient: Tensor | None, terms: RowTerms, *, gradient: bool
    ) -> Tensor: ...


def gradient_scale(dtype: torch.dtype) -> float:
    """A power of two that keeps probabilities around 1/V normal numbers in the logits' dtype.

    It is smaller than a cross-entropy's, for |du| may be a quarter of the largest difference of the log ratios.
    """
    return 2.0**6 if dtype == torch.float16 else 1.0

"""The row step in ATen, for CPUs; the formulas are in :mod:`structfly.lowering.linear_divergence.rows`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from structfly.lowering.linear_divergence.rows import RowTerms

# A block of this many bytes of float32 logits stays, with what is made of it, in a core's cache.
_BLOCK_BYTES = 2**20


def row_step_aten(
    logits: Tensor, teacher: Tensor, coefficient: Tensor | None, terms: RowTerms, *, gradient: bool
) -> Tensor:
    """Fulfils :class:`~structfly.lowering.linear_divergence.rows.RowStep` block of rows by block of rows."""
    rows, classes = logits.shape
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    losses = torch.empty(rows, dtype=dtype, device=logits.device)
    step = max(1, _BLOCK_BYTES // (classes * dtype.itemsize))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        weight = None if coefficient is None else coefficient[part]
        losses[part] = _block(logits[part], teacher[part], weight, terms, dtype, gradient)
    return losses


def _block(
    logits: Tensor, teacher: Tensor, coefficient: Tensor | None, terms: RowTerms, dtype: torch.dtype, gradient: bool
) -> Tensor:
    u = logits if logits.dtype == dtype else logits.to(dtype)
    if terms.bias is not None:
        u.add_(terms.bias.to(dtype))
    needed = terms.epilogue.needed(()) if gradient else frozenset()
    values = terms.epilogue.values(u, (), needed)
    u = values[-1]
    log_p = torch.log_softmax(u, 1, out=None if len(values) - 1 in needed else u)
    q, log_q = _teacher(teacher, terms, dtype)
    loss, du = _divergence(log_p, q, log_q, terms, gradient)
    if coefficient is not None:
        loss.masked_fill_(coefficient == 0, 0.0)
    if du is None:
        return loss
    dz, slope = terms.epilogue.pull_back(du, values, (), (), _no_operands)
    factor = slope * terms.gradient_scale
    if coefficient is not None:
        dz.mul_((coefficient * factor).unsqueeze(1))
        dz.masked_fill_((coefficient == 0).unsqueeze(1), 0.0)
    elif isinstance(factor, Tensor) or factor != 1.0:
        dz.mul_(factor)
    logits.copy_(dz)
    return loss


def _no_operands(operand: int, product: Tensor, factor: Tensor | float) -> None:
    raise AssertionError("a divergence's chain has no tensors")


def _teacher(teacher: Tensor, terms: RowTerms, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """q and log q, as new tensors."""
    if terms.teacher_form == "probabilities":
        q = teacher.to(dtype)
        return q, q.log()
    if terms.teacher_form == "log_probabilities":
        log_q = teacher.to(dtype)
    else:
        t = teacher.to(dtype, copy=True)
        if terms.teacher_bias is not None:
            t.add_(terms.teacher_bias.to(dtype))
        t = terms.teacher_epilogue.values(t, (), ())[-1]
        log_q = torch.log_softmax(t, 1, out=t)
    return log_q.exp(), log_q


def _divergence(
    log_p: Tensor, q: Tensor, log_q: Tensor, terms: RowTerms, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """(R,) losses and, if wanted, (R, C) du."""
    if terms.kind in ("cross_entropy", "forward_kl"):
        if terms.label_smoothing:
            q = (1 - terms.label_smoothing) * q + terms.label_smoothing / q.shape[1]
        loss = _times(q, -log_p if terms.kind == "cross_entropy" else log_q - log_p).sum(1)
        return loss, log_p.exp().mul_(q.sum(1, keepdim=True)).sub_(q) if gradient else None
    p = log_p.exp()
    if terms.kind == "reverse_kl":
        ratio = log_p - log_q
        loss = _times(p, ratio).sum(1)
        return loss, _times(p, ratio - loss.unsqueeze(1)) if gradient else None
    log_m = torch.logaddexp(log_q + math.log(terms.beta), log_p + math.log1p(-terms.beta))
    ratio = log_p - log_m
    mean = _times(p, ratio).sum(1)
    loss = terms.beta * _times(q, log_q - log_m).sum(1) + (1 - terms.beta) * mean
    return loss, _times(p, ratio - mean.unsqueeze(1)).mul_(1 - terms.beta) if gradient else None


def _times(factor: Tensor, logarithm: Tensor) -> Tensor:
    """``factor * logarithm``, and 0 where the factor is 0."""
    return (factor * logarithm).masked_fill_(factor == 0, 0.0)

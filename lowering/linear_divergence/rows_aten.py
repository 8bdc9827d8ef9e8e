"""The row step in ATen, for CPUs; the formulas are in :mod:`structfly.lowering.linear_divergence.rows`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from structfly.lowering.head.chunks import wide_dtype
from structfly.lowering.linear_divergence.rows import RowTerms

# A block of this many bytes of float32 logits stays, with what is made of it, in a core's cache.
_BLOCK_BYTES = 2**20


def row_step_aten(
    logits: Tensor, teacher: Tensor, coefficient: Tensor | None, terms: RowTerms, *, gradient: bool
) -> Tensor:
    """Fulfils :class:`~structfly.lowering.linear_divergence.rows.RowStep` block of rows by block of rows."""
    rows, classes = logits.shape
    dtype = wide_dtype(logits.dtype)
    losses = torch.empty(rows, dtype=dtype, device=logits.device)
    step = max(1, _BLOCK_BYTES // (classes * dtype.itemsize))
    spare = _Spare(losses, step, classes)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        weight = None if coefficient is None else coefficient[part]
        losses[part] = _block(logits[part], teacher[part], weight, terms, spare, gradient)
    return losses


class _Spare:
    """Buffers of a block's shape by name, which every block uses anew, so that none waits for new pages of memory."""

    def __init__(self, like: Tensor, rows: int, classes: int) -> None:
        self._like, self._shape = like, (rows, classes)
        self._buffers: dict[str, Tensor] = {}

    @property
    def dtype(self) -> torch.dtype:
        return self._like.dtype

    def __call__(self, name: str, rows: int) -> Tensor:
        if name not in self._buffers:
            self._buffers[name] = self._like.new_empty(self._shape)
        return self._buffers[name][:rows]


def _block(
    logits: Tensor, teacher: Tensor, coefficient: Tensor | None, terms: RowTerms, spare: _Spare, gradient: bool
) -> Tensor:
    rows = len(logits)
    u = logits if logits.dtype == spare.dtype else spare("u", rows).copy_(logits)
    if terms.bias is not None:
        u.add_(terms.bias.to(u.dtype))
    needed = terms.epilogue.needed(()) if gradient else frozenset()
    values = terms.epilogue.values(u, (), needed)
    u = values[-1]
    log_p = torch.log_softmax(u, 1, out=spare("log_p", rows) if len(values) - 1 in needed else u)
    q, log_q = _teacher(teacher, terms, spare)
    loss, du = _divergence(log_p, q, log_q, terms, spare, gradient)
    if coefficient is not None:
        loss.masked_fill_(coefficient == 0, 0.0)
    if du is None:
        return loss
    dz, slope = terms.epilogue.pull_back(du, values, (), (), _no_operands)
    factor = slope * terms.gradient_scale
    if coefficient is not None:
        dz.mul_((coefficient * factor).unsqueeze(1))
        # Here and below: on a CPU a look may save a pass; a CUDA graph that is being recorded cannot look.
        if dz.is_cuda or not bool(coefficient.all()):
            dz.masked_fill_((coefficient == 0).unsqueeze(1), 0.0)
    elif isinstance(factor, Tensor) or factor != 1.0:
        dz.mul_(factor)
    if dz is not logits:
        logits.copy_(dz)
    return loss


def _no_operands(operand: int, product: Tensor, factor: Tensor | float) -> None:
    raise AssertionError("a divergence's chain has no tensors")


def _teacher(teacher: Tensor, terms: RowTerms, spare: _Spare) -> tuple[Tensor, Tensor]:
    """q and log q, in buffers."""
    q, log_q = spare("q", len(teacher)), spare("log_q", len(teacher))
    if terms.teacher_form == "probabilities":
        q.copy_(teacher)
        return q, torch.log(q, out=log_q)
    log_q.copy_(teacher)
    if terms.teacher_form == "logits":
        if terms.teacher_bias is not None:
            log_q.add_(terms.teacher_bias.to(log_q.dtype))
        t = terms.teacher_epilogue.values(log_q, (), ())[-1]
        log_q = torch.log_softmax(t, 1, out=t)
    return torch.exp(log_q, out=q), log_q


def _divergence(
    log_p: Tensor, q: Tensor, log_q: Tensor, terms: RowTerms, spare: _Spare, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """(R,) losses and, if wanted, (R, C) du; all three tensors are overwritten."""
    rows = len(log_p)
    product = spare("product", rows)
    if terms.kind in ("cross_entropy", "forward_kl"):
        if terms.label_smoothing:
            q.mul_(1 - terms.label_smoothing).add_(terms.label_smoothing / q.shape[1])
        logs = torch.neg(log_p, out=log_q) if terms.kind == "cross_entropy" else log_q.sub_(log_p)
        loss = _times(q, logs, product).sum(1)
        return loss, torch.exp(log_p, out=log_p).mul_(q.sum(1, keepdim=True)).sub_(q) if gradient else None
    p = torch.exp(log_p, out=spare("p", rows))
    if terms.kind == "reverse_kl":
        ratio = log_p.sub_(log_q)
        loss = _times(p, ratio, product).sum(1)
        return loss, _times(p, ratio.sub_(loss.unsqueeze(1)), product) if gradient else None
    log_m = torch.add(log_p, math.log1p(-terms.beta), out=spare("log_m", rows))
    torch.logaddexp(torch.add(log_q, math.log(terms.beta), out=product), log_m, out=log_m)
    of_teacher = _times(q, log_q.sub_(log_m), product).sum(1)
    ratio = log_p.sub_(log_m)
    mean = _times(p, ratio, product).sum(1)
    loss = terms.beta * of_teacher + (1 - terms.beta) * mean
    return loss, _times(p, ratio.sub_(mean.unsqueeze(1)), product).mul_(1 - terms.beta) if gradient else None


def _times(factor: Tensor, logarithm: Tensor, out: Tensor) -> Tensor:
    """``factor * logarithm``, and 0 where the factor is 0."""
    torch.mul(factor, logarithm, out=out)
    if out.is_cuda or not bool(out.sum().isfinite()):  # a factor of 0 may have met an infinite logarithm
        out.masked_fill_(factor == 0, 0.0)
    return out

"""The row step in ATen, for CPUs; the formulas are in :mod:`structfly.lowering.linear_cross_entropy.rows`."""

from __future__ import annotations

import torch
from torch import Tensor

from structfly.lowering.linear_cross_entropy.rows import ClassTerms

# A block of this many bytes of float32 logits stays in a core's cache through all of its passes.
_BLOCK_BYTES = 4 * 2**20


def row_step_aten(
    logits: Tensor, target: Tensor, coefficient: Tensor | None, terms: ClassTerms, *, gradient: bool
) -> Tensor:
    """Fulfils :class:`~structfly.lowering.linear_cross_entropy.rows.RowStep` block of rows by block of rows."""
    rows, classes = logits.shape
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    losses = torch.empty(rows, dtype=dtype, device=logits.device)
    step = max(1, _BLOCK_BYTES // (classes * dtype.itemsize))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        weight = None if coefficient is None else coefficient[part]
        losses[part] = _block(logits[part], target[part], weight, terms, dtype, gradient)
    return losses


def _block(
    logits: Tensor,
    target: Tensor,
    coefficient: Tensor | None,
    terms: ClassTerms,
    dtype: torch.dtype,
    gradient: bool,
) -> Tensor:
    classes = logits.shape[1]
    smoothing = terms.label_smoothing
    u = logits if logits.dtype == dtype else logits.to(dtype)
    if terms.bias is not None:
        u.add_(terms.bias.to(dtype))
    slope = terms.epilogue.apply_(u, derivative=gradient)
    dead_classes = None if terms.mask is None else ~terms.mask
    if dead_classes is not None:
        u.masked_fill_(dead_classes, -torch.inf)

    live = torch.ones_like(target, dtype=torch.bool)
    if terms.ignore_index is not None:
        live &= target != terms.ignore_index
    if coefficient is not None:
        live &= coefficient != 0
    index = torch.where(live, target, 0).unsqueeze(1)
    u_target = u.gather(1, index).squeeze(1)
    if smoothing:
        u_sum = u.sum(1) if terms.weight is None else u @ terms.weight

    # softmax overwrites u; its largest entry is 1 / sum exp(u - top), which gives the normaliser back exactly enough.
    top = u.amax(1)
    p = torch.softmax(u, 1, out=u)
    lse = top - p.amax(1).log()

    # a: the factor of the target's term; total: sum of the class weights times s / C.
    weight_sum: Tensor | float = float(classes) if terms.weight_sum is None else terms.weight_sum
    a = (
        torch.full_like(lse, 1 - smoothing)
        if terms.weight is None
        else terms.weight[index.squeeze(1)] * (1 - smoothing)
    )
    loss = a * (lse - u_target)
    if smoothing:
        loss += (smoothing / classes) * (weight_sum * lse - u_sum)
    loss.masked_fill_(~live, 0.0)
    if not gradient:
        return loss

    if terms.weight is not None:
        p.mul_((a + (smoothing / classes) * weight_sum).unsqueeze(1))
    p.scatter_add_(1, index, -a.unsqueeze(1))
    if smoothing:
        p.sub_(smoothing / classes if terms.weight is None else terms.weight * (smoothing / classes))
    if dead_classes is not None:
        p.masked_fill_(dead_classes, 0.0)
    constant = terms.gradient_scale
    if isinstance(slope, Tensor):
        p.mul_(slope)
    else:
        constant *= slope
    if coefficient is not None:
        p.mul_((coefficient * constant).unsqueeze(1))
    elif constant != 1.0:
        p.mul_(constant)
    if not bool(live.all()):
        p.masked_fill_(~live.unsqueeze(1), 0.0)
    if u is not logits:
        logits.copy_(p)
    return loss

"""The row step in ATen, for CPUs; the formulas are in :mod:`structfly.lowering.linear_cross_entropy.rows`."""

from __future__ import annotations

import torch
from torch import Tensor

from structfly.lowering.linear_cross_entropy.rows import ClassTerms, RowResults

# A block of this many bytes of float32 logits stays in a core's cache through all of its passes.
_BLOCK_BYTES = 4 * 2**20


def row_step_aten(
    logits: Tensor, target: Tensor, coefficient: Tensor | None, terms: ClassTerms, *, gradient: bool
) -> RowResults:
    """Fulfils :class:`~structfly.lowering.linear_cross_entropy.rows.RowStep` block of rows by block of rows."""
    rows, classes = logits.shape
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    losses = torch.empty(rows, dtype=dtype, device=logits.device)
    sums = _no_sums(terms, rows, losses) if gradient else None
    step = max(1, _BLOCK_BYTES // (classes * dtype.itemsize))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        weight = None if coefficient is None else coefficient[part]
        block_sums = None
        if sums is not None:
            block_sums = {o: s if terms.by_class(o) else s[part] for o, s in sums.items()}
        losses[part] = _block(logits[part], target[part], weight, terms.of_rows(part), dtype, block_sums)
    return RowResults(losses, () if sums is None else tuple(sums.values()))


def _no_sums(terms: ClassTerms, rows: int, like: Tensor) -> dict[int, Tensor]:
    """Zeros in which the gradient of each operand that wants one is summed, by operand."""
    wanted = [operand for operand, want in enumerate(terms.operand_gradients) if want]
    return {o: like.new_zeros(terms.operands[o].shape if terms.by_class(o) else rows) for o in wanted}


def _block(
    logits: Tensor,
    target: Tensor,
    coefficient: Tensor | None,
    terms: ClassTerms,
    dtype: torch.dtype,
    sums: dict[int, Tensor] | None,
) -> Tensor:
    """Losses, dz in place of the logits, and the operands' gradients added to ``sums``; None for losses alone."""
    classes = logits.shape[1]
    smoothing = terms.label_smoothing
    z = logits if logits.dtype == dtype else logits.to(dtype)
    if terms.bias is not None:
        z.add_(terms.bias.to(dtype))
    needed = terms.epilogue.needed(terms.operand_gradients) if sums is not None else frozenset()
    values = terms.epilogue.values(z, terms.operands, needed)
    u = values[-1]
    values = [value if number in needed else u for number, value in enumerate(values)]

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
    p = torch.softmax(u, 1) if len(values) - 1 in needed else torch.softmax(u, 1, out=u)
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
    if sums is None:
        return loss

    # du but for the rows' coefficients, which are left for the last factor.
    if terms.weight is not None:
        p.mul_((a + (smoothing / classes) * weight_sum).unsqueeze(1))
    p.scatter_add_(1, index, -a.unsqueeze(1))
    if smoothing:
        p.sub_(smoothing / classes if terms.weight is None else terms.weight * (smoothing / classes))
    # On a CPU a look saves a pass; a CUDA graph that is being recorded cannot look.
    dead = ~live.unsqueeze(1) if live.is_cuda or not bool(live.all()) else None
    weight = torch.ones_like(loss) if coefficient is None else coefficient

    def add_up(operand: int, product: Tensor, factor: Tensor | float) -> None:
        by_row = weight * (factor.reshape(-1) if isinstance(factor, Tensor) else factor)
        if dead is not None:
            product = product.masked_fill(dead, 0.0)
        if terms.by_class(operand):
            sums[operand].addmv_(product.t(), by_row)
        else:
            sums[operand].add_(product.sum(1) * by_row)

    dz, factor = terms.epilogue.pull_back(p, values, terms.operands, terms.operand_gradients, add_up)
    factor = factor * terms.gradient_scale
    if coefficient is not None:
        dz.mul_(coefficient.unsqueeze(1) * factor)
    elif isinstance(factor, Tensor) or factor != 1.0:
        dz.mul_(factor)
    if dead is not None:
        dz.masked_fill_(dead, 0.0)
    if dz is not logits:
        logits.copy_(dz)
    return loss

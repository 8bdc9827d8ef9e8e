"""The row step in ATen, for CPUs; the formulas are in :mod:`structfly.lowering.linear_cross_entropy.rows`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from structfly.lowering.head.chunks import wide_dtype
from structfly.lowering.linear_cross_entropy.rows import (
    ClassTerms,
    Coefficients,
    Indices,
    RowFunction,
    RowResults,
    RowStatistics,
    joined,
)

# A block of this many bytes of float32 logits stays in a core's cache through all of its passes.
_BLOCK_BYTES = 4 * 2**20


def row_step_aten(
    logits: Tensor,
    indices: Indices,
    coefficients: Coefficients | RowFunction | None,
    terms: ClassTerms,
    asked: Sequence[str] = ("loss",),
    *,
    gradient: bool,
) -> RowResults:
    """Fulfils :class:`~structfly.lowering.linear_cross_entropy.rows.RowStep` block of rows by block of rows, in two
    sweeps where a group has more rows than a block."""
    rows, classes = logits.shape
    dtype = wide_dtype(logits.dtype)
    step = max(1, _BLOCK_BYTES // (classes * dtype.itemsize))
    if coefficients is not None and not isinstance(coefficients, Coefficients):
        if coefficients.group_rows > step:
            return _two_sweeps(logits, indices, coefficients, terms, asked, step, gradient=gradient)
        step -= step % coefficients.group_rows
    sums = _no_sums(terms, rows, logits.new_empty(0, dtype=dtype)) if gradient else {}
    statistics, losses = [], []
    for start in range(0, max(rows, 1), step):  # one block where there are no rows, for the statistics' shapes
        part = slice(start, min(start + step, rows))
        factors = None if coefficients is None else coefficients.rows(part)
        known = factors if isinstance(factors, Coefficients) else None
        block = _Block(logits[part], indices.rows(part), known, terms.of_rows(part), asked, dtype, gradient)
        statistics.append(block.statistics())
        if factors is not None and not isinstance(factors, Coefficients):
            row_losses, factors = factors.differentiate(statistics[-1])
            losses.append(row_losses)
        if gradient and factors is not None:
            block.gradient(factors, {o: s if terms.by_class(o) else s[part] for o, s in sums.items()})
    return RowResults(joined(statistics), torch.cat(losses) if losses else None, tuple(sums.values()))


def _two_sweeps(
    logits: Tensor,
    indices: Indices,
    function: RowFunction,
    terms: ClassTerms,
    asked: Sequence[str],
    step: int,
    *,
    gradient: bool,
) -> RowResults:
    """Statistics from copies of blocks of ``step`` rows, then the coefficients, and with these the gradient."""
    parts = [slice(start, start + step) for start in range(0, max(logits.shape[0], 1), step)]
    blocks = (
        row_step_aten(logits[p].clone(), indices.rows(p), None, terms.of_rows(p), asked, gradient=False) for p in parts
    )
    found = joined([block.statistics for block in blocks])
    losses, coefficients = function.differentiate(found)
    sums: tuple[Tensor, ...] = ()
    if gradient:
        sums = row_step_aten(logits, indices, coefficients, terms, (), gradient=True).operand_sums
    return RowResults(found, losses, sums)


def _no_sums(terms: ClassTerms, rows: int, like: Tensor) -> dict[int, Tensor]:
    """Zeros in which the gradient of each operand that wants one is summed, by operand."""
    wanted = [operand for operand, want in enumerate(terms.operand_gradients) if want]
    return {o: like.new_zeros(terms.operands[o].shape if terms.by_class(o) else rows) for o in wanted}


class _Block:
    """Some rows: u, then p = softmax(u), then du and dz, in one buffer where the chain's derivatives allow it."""

    def __init__(
        self,
        logits: Tensor,
        indices: Indices,
        known: Coefficients | None,
        terms: ClassTerms,
        asked: Sequence[str],
        dtype: torch.dtype,
        gradient: bool,
    ) -> None:
        self.logits, self.indices, self.terms, self.asked = logits, indices, terms, asked
        z = logits if logits.dtype == dtype else logits.to(dtype)
        if terms.bias is not None:
            z.add_(terms.bias.to(dtype))
        needed = terms.epilogue.needed(terms.operand_gradients) if gradient else frozenset()
        values = terms.epilogue.values(z, terms.operands, needed)
        self.u = values[-1]
        self.values = [value if number in needed else self.u for number, value in enumerate(values)]
        self.keeps_u = len(values) - 1 in needed
        self.share = terms.label_smoothing / logits.shape[1]
        self.weight_sum: Tensor | float = float(logits.shape[1]) if terms.weight_sum is None else terms.weight_sum
        self.entropy: Tensor | None = None
        self.p_log_p: Tensor | None = None
        self.wants_entropy = "entropy" in asked or (known is not None and known.entropy is not None)
        if indices.target is not None:
            self._read_target(indices.target, known)

    def _read_target(self, target: Tensor, known: Coefficients | None) -> None:
        """``counts`` (R,): the rows with a loss, ``narrowed`` to those with a coefficient if losses are all;
        ``index`` (R, 1): their targets; ``a`` (R,): the target term's factor."""
        terms = self.terms
        self.counts = torch.ones_like(target, dtype=torch.bool)
        if terms.ignore_index is not None:
            self.counts &= target != terms.ignore_index
        self.narrowed = False
        if known is not None and known.loss_rows is not None and tuple(self.asked) == ("loss",):
            self.counts &= known.loss_rows != 0
            self.narrowed = True
        self.index = torch.where(self.counts, target, 0).unsqueeze(1)
        keep = 1 - terms.label_smoothing
        if terms.weight is None:
            self.a = torch.full(target.shape, keep, dtype=self.u.dtype, device=target.device)
        else:
            self.a = terms.weight[self.index.squeeze(1)] * keep

    def statistics(self) -> RowStatistics:
        """What was asked for; makes p."""
        u, asked, terms = self.u, self.asked, self.terms
        u_target = u.gather(1, self.index).squeeze(1) if "loss" in asked else None
        if "loss" in asked and terms.label_smoothing:
            u_sum = u.sum(1) if terms.weight is None else u @ terms.weight
        chosen = u.gather(1, self.indices.choices) if "chosen" in asked and self.indices.choices is not None else None
        argmax = u.argmax(1) if "argmax" in asked else None

        # softmax overwrites u; its largest entry is 1 / sum exp(u - top), which gives the normaliser back exactly
        # enough.
        top = u.amax(1)
        self.p = torch.softmax(u, 1) if self.keeps_u else torch.softmax(u, 1, out=u)
        log_sum = -self.p.amax(1).log()
        lse = top + log_sum

        loss = None
        if u_target is not None:
            loss = self.a * (log_sum + (top - u_target))  # to log_sum's precision where the target is the largest
            if terms.label_smoothing:
                loss += self.share * (self.weight_sum * lse - u_sum)
            loss.masked_fill_(~self.counts, 0.0)
        if self.wants_entropy:
            self.p_log_p = torch.xlogy(self.p, self.p)
            self.entropy = self.p_log_p.sum(1).neg_()
        return RowStatistics(
            loss, lse if "lse" in asked else None, self.entropy if "entropy" in asked else None, argmax, chosen
        )

    def gradient(self, coefficients: Coefficients, sums: Mapping[int, Tensor]) -> None:
        """dz in place of the logits, and the operands' gradients added to ``sums``."""
        terms = self.terms
        # The loss's coefficients alone are left for the last factor; of several each goes into its term of du.
        alone = coefficients.loss is not None and not coefficients.others
        du = self._loss_term() if alone else self._terms(coefficients)
        last = coefficients.loss_rows if alone else None
        live = self._live(coefficients)
        # On a CPU a look saves a pass; a CUDA graph that is being recorded cannot look.
        dead = ~live.unsqueeze(1) if live.is_cuda or not bool(live.all()) else None

        def add_up(operand: int, product: Tensor, factor: Tensor | float) -> None:
            by_row = product.new_ones(product.shape[0]) if last is None else last
            by_row = by_row * (factor.reshape(-1) if isinstance(factor, Tensor) else factor)
            if dead is not None:
                product = product.masked_fill(dead, 0.0)
            if terms.by_class(operand):
                sums[operand].addmv_(product.t(), by_row)
            else:
                sums[operand].add_(product.sum(1) * by_row)

        dz, factor = terms.epilogue.pull_back(du, self.values, terms.operands, terms.operand_gradients, add_up)
        factor = factor * terms.gradient_scale
        if last is not None:
            dz.mul_(last.unsqueeze(1) * factor)
        elif isinstance(factor, Tensor) or factor != 1.0:
            dz.mul_(factor)
        if dead is not None:
            dz.masked_fill_(dead, 0.0)
        if dz is not self.logits:
            self.logits.copy_(dz)

    def _live(self, coefficients: Coefficients) -> Tensor:
        """(R,): the rows with a coefficient that is not 0."""
        loss, lse, entropy, chosen = coefficients
        live = []
        if loss is not None:
            live.append(self.counts if isinstance(loss, float) or self.narrowed else self.counts & (loss != 0))
        live += [each != 0 for each in (lse, entropy) if each is not None]
        live += [] if chosen is None else [(chosen != 0).any(1)]
        if not live:
            return torch.zeros(self.p.shape[0], dtype=torch.bool, device=self.p.device)
        return live[0] if len(live) == 1 else torch.stack(live).any(0)

    def _loss_term(self) -> Tensor:
        """The loss's derivative in place of p."""
        p = self.p
        if self.terms.weight is not None:
            p.mul_((self.a + self.share * self.weight_sum).unsqueeze(1))
        p.scatter_add_(1, self.index, -self.a.unsqueeze(1))
        if self.share:
            p.sub_(self.share if self.terms.weight is None else self.terms.weight * self.share)
        return p

    def _terms(self, coefficients: Coefficients) -> Tensor:
        """du in place of p: what multiplies p_v is one factor a row, the rest is added to single classes or to all."""
        p, rows = self.p, self.p.new_zeros(self.p.shape[0])
        loss, lse, entropy, chosen = coefficients
        if lse is not None:
            rows = rows + lse
        if entropy is not None and self.entropy is not None:
            rows = rows - entropy * self.entropy
        if loss is None:
            p.mul_(rows.unsqueeze(1))
        else:
            self._add_loss(torch.where(self.counts, loss, torch.zeros_like(rows)), rows)
        if entropy is not None and self.p_log_p is not None:
            p.addcmul_(self.p_log_p, entropy.unsqueeze(1), value=-1)
        if chosen is not None and self.indices.choices is not None:
            p.scatter_add_(1, self.indices.choices, chosen)
        return p

    def _add_loss(self, c: Tensor, rows: Tensor) -> None:
        """``c`` times the loss's derivative, plus ``rows`` times p, in place of p; (R,) each.

        The target's entry is made by itself, where p - a is exact: near 1, c p - c a is not.
        """
        p, weight = self.p, self.terms.weight
        total: Tensor | float = 1.0 if weight is None else self.a + self.share * self.weight_sum
        p_target = p.gather(1, self.index).squeeze(1)
        at_target = c * (total * p_target - self.a) + rows * p_target
        p.mul_((c * total + rows).unsqueeze(1))
        p.scatter_(1, self.index, at_target.unsqueeze(1))
        if self.share:
            taken = (c * self.share).unsqueeze(1)
            p.sub_(taken if weight is None else weight * taken)

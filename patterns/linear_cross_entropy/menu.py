"""The head's candidates: left dense, or fused by one of two schemes, in chunks of some length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import sympy
import torch

from structfly.config import SiteSettings
from structfly.lowering.gemm import busy, full_row_counts
from structfly.lowering.head.chunks import accumulation_dtype, row_stride, saved_dtype
from structfly.lowering.head.linear import Wanted
from structfly.lowering.linear_cross_entropy.schedule import (
    ROWS_A_SUM,
    exponential_rows,
    exponentials_bytes,
    operand_sum_bytes,
    why_no_exponentials,
)
from structfly.patterns.linear_cross_entropy.logits import LogitsPath, example_of
from structfly.patterns.linear_cross_entropy.site import HeadSite
from structfly.records import Candidate, Cost, DeviceProfile, Menu, Stage
from structfly.records.cost import Expression, at_sizes

# Logits below this many bytes are not worth saving memory on: time alone decides.
_SMALL = 16 * 2**20
# What a chunk of rows may take where its exponentials are not kept.
_STATISTICS = 8 * 2**20


@dataclass(frozen=True)
class FusedCandidate(Candidate):
    """A fused candidate; ``schedule``, ``scheme`` and ``workspace`` are the op's arguments of these names."""

    schedule: str = "forward"
    scheme: str = "logits"
    workspace: int = 0


class Sized(Protocol):
    """What the sizes of a head are read from; the attributes are those of :class:`HeadSite`."""

    @property
    def sizes(self) -> Mapping[sympy.Symbol, int]: ...
    @property
    def rows(self) -> sympy.Expr: ...
    @property
    def hidden(self) -> sympy.Expr: ...
    @property
    def classes(self) -> sympy.Expr: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def path(self) -> LogitsPath: ...
    @property
    def gradients(self) -> Wanted: ...


def head_menu(site: HeadSite, profile: DeviceProfile, settings: SiteSettings) -> Menu:
    """Costs of leaving the head dense and of fusing it with several chunk lengths, and the limit they must keep."""
    sizes = HeadSizes(site)
    schemes = ["logits"]
    if profile.generated_products and not _why_no_exponentials(site, sizes):
        schemes.append("exponentials")
    limit = peak_limit(sizes, schemes, profile, settings)
    schedules = schedules_of(site.gradients, site.recompute)
    candidates: list[Candidate] = [_dense(site)]
    for scheme in schemes:
        for length in sizes.chunk_lengths(limit, profile, scheme):
            candidates.extend(_fused(site, sizes, length, schedule, scheme, profile) for schedule in schedules)
    x_bytes, weight_bytes = sizes.gradient_bytes
    return Menu(
        tuple(candidates),
        peak_limit=limit,
        own_bytes=x_bytes,
        shared_bytes={site.path.linear.weight.name: weight_bytes},
    )


def peak_limit(sizes: HeadSizes, schemes: Sequence[str], profile: DeviceProfile, settings: SiteSettings) -> int:
    """``budget.loss_memory`` where it is set.  Otherwise a quarter of the logits, at most the profile's cap, but always
    what the profile's fast row count takes and never less than 16 MiB."""
    if settings.loss_memory is not None:
        return settings.loss_memory
    quarter = min(sizes.rows * sizes.row_bytes // 4, profile.workspace_cap)
    fast = min(sizes.rows, profile.fast_rows)
    return max(quarter, min(sizes.transient_bytes(fast, scheme) for scheme in schemes), _SMALL)


def schedules_of(gradients: Wanted, recompute: str) -> list[str]:
    """The schedules that can be chosen from; ``recompute`` says why gradients may not be made in forward, or ""."""
    if not gradients.any:
        return ["forward"]
    return ["backward"] if recompute else ["forward", "backward"]


def _why_no_exponentials(site: HeadSite, sizes: HeadSizes) -> str:
    linear = site.path.linear
    reason = why_no_exponentials(
        site.dtype,
        sizes.hidden,
        site.path.chain.epilogue,
        label_smoothing=site.form.label_smoothing,
        adapter=linear.adapter is not None,
        bias_gradient=site.gradients.bias,
    )
    weight = example_of(linear.weight)
    rows, columns = (1, 0) if linear.transposed else (0, 1)  # classes, hidden units
    inner = columns if weight.stride(columns) == 1 else rows
    if reason or (weight.stride(inner) == 1 and weight.shape[inner] % 8 == 0):
        return reason
    return f"its weight's rows of {weight.shape[inner]} do not begin at multiples of 16 bytes"


class HeadSizes:
    """The head's sizes at the example values of its symbols; ``beside`` are bytes that a class of a row takes beside
    its logit."""

    def __init__(self, site: Sized, beside: int = 0) -> None:
        self._site = site
        self.rows = max(1, int(at_sizes(site.rows, site.sizes)))
        self.hidden = int(at_sizes(site.hidden, site.sizes))
        self.classes = int(at_sizes(site.classes, site.sizes))
        self.row_bytes = row_stride(self.classes) * (site.dtype.itemsize + beside)

    def transient_bytes(self, length: int, scheme: str) -> int:
        """Bytes beyond the gradients themselves: the logits of ``length`` rows, and the gradients' own sums.

        A weight's sum of another dtype than the gradient's stands for the gradient while there are logits, and beside
        it after.
        """
        if scheme == "exponentials":
            gradients = self._site.gradients
            return exponentials_bytes(length, self.hidden, self.classes, dx=gradients.x, dw=gradients.weight)
        logits = length * self.row_bytes
        total, gradient = self._sum_bytes(-(-self.rows // length))
        return self._operand_bytes(length) + (max(total, total - gradient + logits) if total != gradient else logits)

    @property
    def gradient_bytes(self) -> tuple[int, int]:
        """Bytes of dx and dW between the passes."""
        item = saved_dtype(self._site.dtype).itemsize
        wanted = self._site.gradients
        return self.rows * self.hidden * item * wanted.x, self.classes * self.hidden * item * wanted.weight

    def chunk_lengths(self, limit: int, profile: DeviceProfile, scheme: str) -> list[int]:
        """Halvings of the row count down to an eighth of the fast one, and the longest that fits the limit.

        For exponentials, whose rows are a side of a generated product, also those that just fill the device.
        """
        lengths = {self.rows}
        while (shortest := min(lengths)) > max(1, profile.fast_rows // 8):
            lengths.add(-(-shortest // 2))
        if scheme == "exponentials" and not self._site.gradients.any:
            limit = min(limit, _STATISTICS)
            lengths = {length for length in lengths if self.transient_bytes(length, scheme) <= limit}
        longest = min(self._longest(limit, scheme), self.rows)
        if longest > 0:
            lengths.add(longest)
        if scheme == "exponentials":
            lengths.update(full_row_counts(self.hidden, profile.processors, longest))
            lengths = {exponential_rows(self.rows, self.classes, length * self.row_bytes) for length in lengths}
        return sorted(lengths, reverse=True)

    def _longest(self, limit: int, scheme: str) -> int:
        """The most rows whose chunks, of which there are several, fit ``limit``: bytes are affine in the rows."""
        if self.rows <= 2:
            return self.rows
        if scheme == "exponentials":
            fixed = 2 * self.transient_bytes(1, scheme) - self.transient_bytes(2, scheme)
            return (limit - fixed) // (self.transient_bytes(1, scheme) - fixed)
        total, gradient = self._sum_bytes(chunks=2)
        fixed = total - gradient + self._operand_bytes(ROWS_A_SUM)
        row = (self._operand_bytes(2 * ROWS_A_SUM) - self._operand_bytes(ROWS_A_SUM)) // ROWS_A_SUM
        return (limit - fixed) // (self.row_bytes + row)

    def _operand_bytes(self, length: int) -> int:
        chain, wanted = self._site.path.chain.epilogue, self._site.gradients.operands
        return operand_sum_bytes(chain, wanted, self.rows, length, self.classes)

    def _sum_bytes(self, chunks: int) -> tuple[int, int]:
        """Bytes of the weight gradient's sum, and of the gradient; 0 if it is not wanted."""
        count = self.classes * self.hidden if self._site.gradients.weight else 0
        dtype = self._site.dtype
        return count * accumulation_dtype(dtype, chunks).itemsize, count * saved_dtype(dtype).itemsize


def matmul(rows: Expression, inner: Expression, columns: Expression, launches: Expression, dtype: torch.dtype) -> Stage:
    moved = (rows * inner + inner * columns + rows * columns) * dtype.itemsize
    return Stage(2 * rows * inner * columns, moved, launches, dtype, rows)


def _dense(site: HeadSite) -> Candidate:
    n, h, c, dtype = site.rows, site.hidden + site.rank, site.classes, site.dtype
    logits = n * c * dtype.itemsize
    stages = [matmul(n, h, c, 1, dtype), Stage(0, 2 * logits, 1)]
    if site.gradients.any:
        stages.append(Stage(0, 2 * logits, 1))
        stages.extend(matmul(n, c, h, 1, dtype) for wanted in (site.gradients.x, site.gradients.weight) if wanted)
    return Candidate("dense", Cost(tuple(stages), transient_bytes=logits, saved_bytes=0), rewrites=False)


def _fused(
    site: HeadSite, sizes: HeadSizes, length: int, schedule: str, scheme: str, profile: DeviceProfile
) -> FusedCandidate:
    n, h, c, dtype = site.rows, site.hidden + site.rank, site.classes, site.dtype
    launches, rows = n / length, sympy.Integer(length)  # no candidate is longer than the example's rows
    chunk = rows * c * dtype.itemsize
    logits = [matmul(rows, h, c, launches, dtype)]
    if scheme == "logits":
        logits.append(Stage(0, 2 * chunk, launches))  # the row step
    stages = list(logits)
    operands = site.path.chain.operands
    calls = 1
    saved: Expression = 0
    if site.gradients.any:
        if any(o.kind == "class" and wanted for o, wanted in zip(operands, site.gradients.operands, strict=True)):
            stages.append(Stage(0, chunk, launches))  # the row step's second sweep, in a kernel of its own
        if schedule == "backward":
            stages.extend(logits)
            calls = 2
        else:
            saved = sum(sizes.gradient_bytes)
        if site.gradients.x:
            hidden = matmul(rows, c, h, launches, dtype)
            if scheme == "exponentials" and not site.gradients.weight:  # few large tiles, and nothing to fill the gaps
                share = max(busy(length, sizes.hidden, split, profile.processors) for split in (1, 2))
                hidden = replace(hidden, flops=hidden.flops / share)
            stages.append(hidden)
        if site.gradients.weight:
            moved = (rows * c + rows * h) * dtype.itemsize
            if scheme == "exponentials":  # 20 bits of the sum are read and written between the tiles' arithmetic
                stages.append(Stage(0, 2 * c * h * 2.5, launches))
            else:
                moved += 2 * c * h * accumulation_dtype(dtype, -(-sizes.rows // length)).itemsize
            stages.append(Stage(2 * rows * c * h, moved, launches, dtype, rows))
    cost = Cost(tuple(stages), sizes.transient_bytes(length, scheme), saved, opaque_calls=calls)
    when = {"forward": "gradients in forward", "backward": "recompute"}[schedule] if site.gradients.any else "loss only"
    return FusedCandidate(
        f"{scheme}, {length} rows a chunk, {when}",
        cost,
        schedule=schedule,
        scheme=scheme,
        workspace=length * sizes.row_bytes,
    )

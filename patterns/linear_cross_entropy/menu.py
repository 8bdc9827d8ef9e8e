"""The head's candidates: left dense, or fused in chunks of some length, with gradients made early or late."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch

from structfly.config import SiteSettings
from structfly.lowering.linear_cross_entropy.schedule import accumulation_dtype, row_stride, saved_dtype
from structfly.patterns.linear_cross_entropy.site import HeadSite
from structfly.records import Candidate, Cost, DeviceProfile, Menu, Stage
from structfly.records.cost import Expression, at_sizes

# Logits below this many bytes are not worth saving memory on: time alone decides.
_SMALL = 16 * 2**20


@dataclass(frozen=True)
class FusedCandidate(Candidate):
    """A fused candidate; ``schedule`` and ``workspace`` are the op's arguments of these names."""

    schedule: str = "forward"
    workspace: int = 0


def head_menu(site: HeadSite, profile: DeviceProfile, settings: SiteSettings) -> Menu:
    """Costs of leaving the head dense and of fusing it with several chunk lengths, and the limit they must keep.

    The limit is ``budget.loss_memory`` where it is set.  Otherwise it is a quarter of the logits, at most the
    profile's cap, but always what the profile's fast row count takes and never less than 16 MiB.
    """
    sizes = _Sizes(site)
    limit = settings.loss_memory
    if limit is None:
        quarter = min(sizes.rows * sizes.row_bytes // 4, profile.workspace_cap)
        limit = max(quarter, sizes.transient_bytes(min(sizes.rows, profile.fast_rows)), _SMALL)
    schedules = ["backward"] if site.recompute else ["forward", "backward"]
    if not any(site.gradients):
        schedules = ["forward"]
    candidates: list[Candidate] = [_dense(site)]
    for length in sizes.chunk_lengths(limit, profile.fast_rows):
        candidates.extend(_fused(site, sizes, length, schedule) for schedule in schedules)
    x_bytes, weight_bytes = sizes.gradient_bytes
    return Menu(
        tuple(candidates),
        peak_limit=limit,
        own_bytes=x_bytes,
        shared_bytes={site.path.linear.weight.name: weight_bytes},
    )


class _Sizes:
    """The head's sizes at the example values of its symbols."""

    def __init__(self, site: HeadSite) -> None:
        self._site = site
        self.rows = max(1, int(at_sizes(site.rows, site.sizes)))
        self.hidden = int(at_sizes(site.hidden, site.sizes))
        self.classes = int(at_sizes(site.classes, site.sizes))
        self.row_bytes = row_stride(self.classes) * site.dtype.itemsize

    def transient_bytes(self, length: int) -> int:
        """Bytes beyond the gradients themselves: the logits of ``length`` rows, and the weight gradient's own sum.

        A sum of another dtype than the gradient's stands for the gradient while there are logits, and beside it after.
        """
        logits = length * self.row_bytes
        total, gradient = self._sum_bytes(-(-self.rows // length))
        return max(total, total - gradient + logits) if total != gradient else logits

    @property
    def gradient_bytes(self) -> tuple[int, int]:
        """Bytes of dx and dW between the passes."""
        item = saved_dtype(self._site.dtype).itemsize
        x, weight, *_ = self._site.gradients
        return self.rows * self.hidden * item * x, self.classes * self.hidden * item * weight

    def chunk_lengths(self, limit: int, fast_rows: int) -> list[int]:
        """Halvings of the row count down to an eighth of the fast one, and the longest that fits the limit."""
        lengths = {self.rows}
        while (shortest := min(lengths)) > max(1, fast_rows // 8):
            lengths.add(-(-shortest // 2))
        total, gradient = self._sum_bytes(chunks=2)
        longest = (limit - total + gradient) // self.row_bytes
        lengths.add(max(1, min(longest, self.rows)))
        return sorted(lengths, reverse=True)

    def _sum_bytes(self, chunks: int) -> tuple[int, int]:
        """Bytes of the weight gradient's sum, and of the gradient; 0 if it is not wanted."""
        count = self.classes * self.hidden if self._site.gradients[1] else 0
        dtype = self._site.dtype
        return count * accumulation_dtype(dtype, chunks).itemsize, count * saved_dtype(dtype).itemsize


def _matmul(
    rows: Expression, inner: Expression, columns: Expression, launches: Expression, dtype: torch.dtype
) -> Stage:
    moved = (rows * inner + inner * columns + rows * columns) * dtype.itemsize
    return Stage(2 * rows * inner * columns, moved, launches, dtype, rows)


def _dense(site: HeadSite) -> Candidate:
    n, h, c, dtype = site.rows, site.hidden + site.rank, site.classes, site.dtype
    logits = n * c * dtype.itemsize
    stages = [_matmul(n, h, c, 1, dtype), Stage(0, 2 * logits, 1)]
    if any(site.gradients):
        stages.append(Stage(0, 2 * logits, 1))
        stages.extend(_matmul(n, c, h, 1, dtype) for wanted in site.gradients[:2] if wanted)
    return Candidate("dense", Cost(tuple(stages), transient_bytes=logits, saved_bytes=0), rewrites=False)


def _fused(site: HeadSite, sizes: _Sizes, length: int, schedule: str) -> FusedCandidate:
    n, h, c, dtype = site.rows, site.hidden + site.rank, site.classes, site.dtype
    launches, rows = n / length, sympy.Integer(length)  # no candidate is longer than the example's rows
    chunk = rows * c * dtype.itemsize
    logits, row_step = _matmul(rows, h, c, launches, dtype), Stage(0, 2 * chunk, launches)
    stages = [logits, row_step]
    calls = 1
    saved: Expression = 0
    if any(site.gradients):
        if schedule == "backward":
            stages.extend((logits, row_step))
            calls = 2
        else:
            saved = sum(sizes.gradient_bytes)
        if site.gradients[0]:
            stages.append(_matmul(rows, c, h, launches, dtype))
        if site.gradients[1]:
            total = accumulation_dtype(dtype, -(-sizes.rows // length)).itemsize
            moved = (rows * c + rows * h) * dtype.itemsize + 2 * c * h * total
            stages.append(Stage(2 * rows * c * h, moved, launches, dtype, rows))
    cost = Cost(tuple(stages), sizes.transient_bytes(length), saved, opaque_calls=calls)
    when = (
        {"forward": "gradients in forward", "backward": "recompute"}[schedule] if any(site.gradients) else "loss only"
    )
    return FusedCandidate(f"{length} rows a chunk, {when}", cost, schedule=schedule, workspace=length * sizes.row_bytes)

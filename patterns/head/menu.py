"""What the menus of heads have in common: sizes, limits, and the costs of their matrix products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import sympy
import torch

from structfly.config import SiteSettings
from structfly.lowering.head.chunks import ROWS_A_SUM, accumulation_dtype, operand_sum_bytes, row_stride, saved_dtype
from structfly.lowering.head.epilogue import Epilogue
from structfly.lowering.head.linear import Wanted
from structfly.records import Candidate, DeviceProfile, Menu, Stage
from structfly.records.cost import Expression, at_sizes

# Logits below this many bytes are not worth saving memory on: time alone decides.
_SMALL = 16 * 2**20


class Head(Protocol):
    """What a menu asks of a head, be it a site in a graph or a call of :mod:`structfly.ops`.

    Attributes:
        rows, hidden, classes, rank: N, H, C and the adapter's R (0 without one).
        sizes: example values of the symbols in those.
        dtype: of the logits: what the matrix products run in.
        gradients: which are wanted.
        coefficient_class: how a row's coefficient depends on logits, as of a
            :class:`~structfly.patterns.head.site.HeadSite`.
        recompute: why gradients cannot or should not be made in the forward pass, or "".
        outputs: what the op gives beside gradients.
        epilogue: the pointwise chain.
        adapter: whether there is a low-rank update.
        weight_row: entries of the rows that the weight lies in, of classes or of hidden units; 0 if they are spread.
        weight_name: the same for heads that share it.
    """

    @property
    def rows(self) -> sympy.Expr: ...
    @property
    def hidden(self) -> sympy.Expr: ...
    @property
    def classes(self) -> sympy.Expr: ...
    @property
    def rank(self) -> sympy.Expr: ...
    @property
    def sizes(self) -> Mapping[sympy.Symbol, int]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def gradients(self) -> Wanted: ...
    @property
    def coefficient_class(self) -> str: ...
    @property
    def recompute(self) -> str: ...
    @property
    def outputs(self) -> tuple[str, ...]: ...
    @property
    def epilogue(self) -> Epilogue: ...
    @property
    def adapter(self) -> bool: ...
    @property
    def weight_row(self) -> int: ...
    @property
    def weight_name(self) -> str: ...


@dataclass(frozen=True)
class FusedCandidate(Candidate):
    """A fused candidate; ``schedule``, ``scheme`` and ``workspace`` are the op's arguments of these names."""

    schedule: str = "forward"
    scheme: str = "logits"
    workspace: int = 0


def contiguous_row(weight: torch.Tensor) -> int:
    """A head's ``weight_row``, of a weight stored either way."""
    inner = 1 if weight.stride(1) == 1 else 0
    return weight.shape[inner] if weight.stride(inner) == 1 else 0


def menu_of(site: Head, sizes: HeadSizes, limit: int, candidates: Sequence[Candidate]) -> Menu:
    """The menu of these candidates, with what gradients take between the passes."""
    x_bytes, weight_bytes = sizes.gradient_bytes
    return Menu(
        tuple(candidates),
        peak_limit=limit,
        own_bytes=x_bytes,
        shared_bytes={site.weight_name: weight_bytes},
    )


def peak_limit(
    schemes: Sequence[HeadSizes], profile: DeviceProfile, settings: SiteSettings, group_rows: int = 1
) -> int:
    """``budget.loss_memory`` where it is set.  Otherwise a quarter of the logits, at most the profile's cap, but always
    what the profile's fast row count takes in the leanest of ``schemes`` and never less than 16 MiB.

    Where gradients take the coefficients of ``group_rows`` rows together, the fast row count is of whole groups: logits
    of a group that no chunk holds are made twice, 8NHC operations where a dense head has 6NHC.
    """
    if settings.loss_memory is not None:
        return settings.loss_memory
    head = schemes[0]
    quarter = min(head.rows * head.row_bytes // 4, profile.workspace_cap)
    group = group_rows if head.site.gradients.any else 1
    fast = min(head.rows, -(-profile.fast_rows // group) * group)
    return max(quarter, min(sizes.transient_bytes(fast) for sizes in schemes), _SMALL)


def schedules_of(gradients: Wanted, recompute: str) -> list[str]:
    """The schedules that can be chosen from; ``recompute`` says why gradients may not be made in forward, or ""."""
    if not gradients.any:
        return ["forward"]
    return ["backward"] if recompute else ["forward", "backward"]


def passes(site: Head, schedule: str) -> str:
    """What the op gives, when its gradients are made, and why, for a candidate's name."""
    outputs = " and ".join(site.outputs)
    if not site.gradients.any:
        return f"{outputs} only"
    if schedule == "forward":
        return f"{outputs}, gradients in forward (class {site.coefficient_class})"
    return f"{outputs}, recompute (class {site.coefficient_class}{site.recompute and ': '}{site.recompute})"


class HeadSizes:
    """The head's sizes at the example values of its symbols, and what a chunk of its logits takes; ``beside`` are bytes
    that a class of a row takes beside its logit."""

    def __init__(self, site: Head, beside: int = 0) -> None:
        self.site = site
        self.rows = max(1, int(at_sizes(site.rows, site.sizes)))
        self.hidden = int(at_sizes(site.hidden, site.sizes))
        self.classes = int(at_sizes(site.classes, site.sizes))
        self.row_bytes = row_stride(self.classes) * (site.dtype.itemsize + beside)

    def transient_bytes(self, length: int) -> int:
        """Bytes beyond the gradients themselves: the logits of ``length`` rows, and the gradients' own sums.

        A weight's sum of another dtype than the gradient's stands for the gradient while there are logits, and beside
        it after.
        """
        logits = length * self.row_bytes
        total, gradient = self._sum_bytes(-(-self.rows // length))
        return self._operand_bytes(length) + (max(total, total - gradient + logits) if total != gradient else logits)

    @property
    def gradient_bytes(self) -> tuple[int, int]:
        """Bytes of dx and dW between the passes."""
        item, wanted = saved_dtype(self.site.dtype).itemsize, self.site.gradients
        return self.rows * self.hidden * item * wanted.x, self.classes * self.hidden * item * wanted.weight

    def chunk_lengths(self, limit: int, profile: DeviceProfile) -> list[int]:
        """Halvings of the row count down to an eighth of the fast one, and the longest that fits the limit."""
        lengths = {self.rows}
        while (shortest := min(lengths)) > max(1, profile.fast_rows // 8):
            lengths.add(-(-shortest // 2))
        longest = self.longest(limit)
        if longest > 0:
            lengths.add(longest)
        return sorted(lengths, reverse=True)

    def longest(self, limit: int) -> int:
        """The most rows whose chunks, of which there are several, fit ``limit``: bytes are affine in the rows."""
        if self.rows <= 2:
            return self.rows
        total, gradient = self._sum_bytes(chunks=2)
        fixed = total - gradient + self._operand_bytes(ROWS_A_SUM)
        row = (self._operand_bytes(2 * ROWS_A_SUM) - self._operand_bytes(ROWS_A_SUM)) // ROWS_A_SUM
        return min((limit - fixed) // (self.row_bytes + row), self.rows)

    def _operand_bytes(self, length: int) -> int:
        wanted = self.site.gradients.operands
        return operand_sum_bytes(self.site.epilogue, wanted, self.rows, length, self.classes)

    def _sum_bytes(self, chunks: int) -> tuple[int, int]:
        """Bytes of the weight gradient's sum, and of the gradient; 0 if it is not wanted."""
        count = self.classes * self.hidden if self.site.gradients.weight else 0
        dtype = self.site.dtype
        return count * accumulation_dtype(dtype, chunks).itemsize, count * saved_dtype(dtype).itemsize


def matmul(rows: Expression, inner: Expression, columns: Expression, launches: Expression, dtype: torch.dtype) -> Stage:
    moved = (rows * inner + inner * columns + rows * columns) * dtype.itemsize
    return Stage(2 * rows * inner * columns, moved, launches, dtype, rows)


def dense_gradients(site: Head) -> list[Stage]:
    """The gradients' products of a head that is left dense."""
    wanted = (site.gradients.x, site.gradients.weight)
    return [matmul(site.rows, site.classes, site.hidden + site.rank, 1, site.dtype) for want in wanted if want]


def hidden_product(site: Head, rows: Expression, launches: Expression) -> Stage:
    """A chunk's product for the hidden states' gradient."""
    return matmul(rows, site.classes, site.hidden + site.rank, launches, site.dtype)


def weight_product(site: Head, rows: Expression, launches: Expression, sum_bytes: Expression) -> Stage:
    """A chunk's product for the weight's gradient, which moves ``sum_bytes`` of the sum."""
    c, h, dtype = site.classes, site.hidden + site.rank, site.dtype
    return Stage(2 * rows * c * h, (rows * c + rows * h) * dtype.itemsize + sum_bytes, launches, dtype, rows)


def weight_sum_bytes(site: Head, sizes: HeadSizes, length: int) -> Expression:
    """Bytes that a chunk of ``length`` rows of logits reads and writes of the weight gradient's sum."""
    total = accumulation_dtype(site.dtype, -(-sizes.rows // length)).itemsize
    return 2 * site.classes * (site.hidden + site.rank) * total

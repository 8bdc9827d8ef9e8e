"""The loss head's candidates: left dense, or fused by one of three schemes, in chunks or blocks of some size."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import sympy

from structfly.config import SiteSettings
from structfly.lowering.gemm import TORCH_MM, busy, full_row_counts
from structfly.lowering.linear_cross_entropy.schedule import (
    bias_sum_bytes,
    block_sizes,
    exponential_rows,
    exponentials_bytes,
    why_no_blocks,
    why_no_exponentials,
)
from structfly.lowering.linear_cross_entropy.tiles import HeadTiles, head_class, head_tiles
from structfly.patterns.head.menu import (
    FusedCandidate,
    Head,
    HeadSizes,
    dense_gradients,
    hidden_product,
    matmul,
    menu_of,
    passes,
    peak_limit,
    schedules_of,
    weight_product,
    weight_sum_bytes,
)
from structfly.records import Candidate, Cost, DeviceProfile, Menu, Stage
from structfly.records.cost import Expression, at_sizes

# What a chunk of rows may take where its exponentials are not kept, and the user has set no limit.
_STATISTICS = 8 * 2**20


class CrossEntropyHead(Head, Protocol):
    """A head and what its logits feed.

    Attributes:
        label_smoothing: the loss's.
        consumers: how many read the logits where they are left dense.
        row_program: what makes the loss of a row, or of a group of rows, of their statistics, or "".
        group_rows: how many rows make a group, at the example's sizes.
        regrouped: whether the op takes the rows in another order than the user's.
    """

    @property
    def label_smoothing(self) -> float: ...
    @property
    def consumers(self) -> int: ...
    @property
    def row_program(self) -> str: ...
    @property
    def group_rows(self) -> int: ...
    @property
    def regrouped(self) -> bool: ...


class LogitSizes(HeadSizes):
    """The same in the scheme of logits, where chunks hold whole groups of rows."""

    def __init__(self, site: CrossEntropyHead) -> None:
        super().__init__(site)
        self.group_rows = site.group_rows
        # Rows in another order are a copy of the hidden states.
        self.copied = self.rows * self.hidden * site.dtype.itemsize if site.regrouped else 0

    def transient_bytes(self, length: int) -> int:
        return super().transient_bytes(length) + self.copied

    def chunk_lengths(self, limit: int, profile: DeviceProfile) -> list[int]:
        """Whole groups where one fits a length."""
        lengths = super().chunk_lengths(limit, profile)
        whole = {length - length % self.group_rows if length >= self.group_rows else length for length in lengths}
        return sorted(whole, reverse=True)

    def longest(self, limit: int) -> int:
        return super().longest(limit - self.copied)


class ExponentialSizes(HeadSizes):
    """The same in the scheme of exponentials.

    ``tiles`` are those of the head's products; ``sparing``: a loss alone takes little, for the user has set no limit.
    """

    def __init__(self, site: Head, tiles: HeadTiles, *, sparing: bool) -> None:
        super().__init__(site)
        self.tiles, self.sparing = tiles, sparing

    def transient_bytes(self, length: int) -> int:
        """Bytes beyond the gradients themselves."""
        site = self.site
        return exponentials_bytes(
            self.rows, length, self.hidden, self.classes, self.tiles, wanted=site.gradients, epilogue=site.epilogue
        )

    def chunk_lengths(self, limit: int, profile: DeviceProfile) -> list[int]:
        """Also those that just fill the device, for rows are a side of a generated product; all in whole tiles."""
        if self.sparing and not self.site.gradients.any:
            limit = min(limit, _STATISTICS)
        lengths = super().chunk_lengths(limit, profile)
        if not self.site.gradients.any:
            lengths = [length for length in lengths if self.transient_bytes(length) <= limit] or [1]
        cut = self.tiles.hidden_product
        if cut != TORCH_MM:
            lengths += full_row_counts(self.hidden, profile.processors, self.longest(limit), cut)
        whole = {exponential_rows(self.rows, self.classes, length * self.row_bytes) for length in lengths}
        return sorted(whole, reverse=True)

    def longest(self, limit: int) -> int:
        """The most rows whose chunks fit ``limit``."""
        fixed = 2 * self.transient_bytes(1) - self.transient_bytes(2)
        return min((limit - fixed) // (self.transient_bytes(1) - fixed), self.rows)


def head_menu(site: CrossEntropyHead, profile: DeviceProfile, settings: SiteSettings) -> Menu:
    """Costs of leaving the head dense and of fusing it with several chunk lengths, and the limit they must keep."""
    schemes: dict[str, HeadSizes] = {"logits": LogitSizes(site)}
    tiles = None
    if profile.generated_products and not _why_no_exponentials(site):
        tiles = _tiles_of(site, schemes["logits"], profile)
        schemes["exponentials"] = ExponentialSizes(site, tiles, sparing=settings.loss_memory is None)
    limit = peak_limit(list(schemes.values()), profile, settings, site.group_rows)
    # A program makes its coefficients, and with them the gradients, in the forward pass.
    schedules = ["forward"] if site.row_program else schedules_of(site.gradients, site.recompute)
    candidates: list[Candidate] = [_dense(site)]
    if tiles is not None and site.gradients.any and not why_no_blocks(site.epilogue):
        candidates += [_blocks(site, schemes["logits"], limit, schedule, profile, tiles) for schedule in schedules]
    for scheme, sizes in schemes.items():
        for length in sizes.chunk_lengths(limit, profile):
            for schedule in schedules:
                candidates.append(_fused(site, sizes, length, schedule, scheme, profile))
    return menu_of(site, schemes["logits"], limit, candidates)


def _why_no_exponentials(site: CrossEntropyHead) -> str:
    reason = why_no_exponentials(
        site.dtype,
        int(at_sizes(site.hidden, site.sizes)),
        site.epilogue,
        label_smoothing=site.label_smoothing,
        adapter=site.adapter,
        wanted=site.gradients,
        statistics=site.outputs != ("loss",) or bool(site.row_program),
    )
    row = site.weight_row
    if reason or (row and row % 8 == 0):
        return reason
    return f"its weight's rows of {row} do not begin at multiples of 16 bytes" if row else "its weight is spread out"


def _tiles_of(site: CrossEntropyHead, sizes: HeadSizes, profile: DeviceProfile) -> HeadTiles:
    """The tiles that the op will take."""
    return head_tiles(
        head_class(
            profile.model,
            hidden=sizes.hidden,
            classes=sizes.classes,
            weight_row=int(site.weight_row),
            nonlinear=site.epilogue.without_dead_classes[0].slopes_vary,
        )
    )


def _dense(site: CrossEntropyHead) -> Candidate:
    n, h, c, dtype = site.rows, site.hidden + site.rank, site.classes, site.dtype
    logits = n * c * dtype.itemsize
    stages = [matmul(n, h, c, 1, dtype), Stage(0, 2 * logits, site.consumers)]
    if site.gradients.any:
        stages.append(Stage(0, 2 * logits, 1))
        stages.extend(dense_gradients(site))
        if site.gradients.bias:
            stages.append(Stage(0, logits, 1))
    return Candidate("dense", Cost(tuple(stages), transient_bytes=logits, saved_bytes=0), rewrites=False)


def _fused(
    site: CrossEntropyHead, sizes: HeadSizes, length: int, schedule: str, scheme: str, profile: DeviceProfile
) -> FusedCandidate:
    n, h, c, dtype = site.rows, site.hidden + site.rank, site.classes, site.dtype
    launches, rows = n / length, sympy.Integer(length)  # no candidate is longer than the example's rows
    chunk = rows * c * dtype.itemsize
    logits = [matmul(rows, h, c, launches, dtype)]
    if scheme == "logits":
        # On a GPU a program runs between two launches: both read, and the second writes.
        sweeps = 3 if site.row_program and profile.kind == "cuda" else 2
        logits.append(Stage(0, sweeps * chunk, launches))  # the row step
    if site.row_program:  # each instruction, and two for its derivative
        logits.append(Stage(0, 3 * rows * 4, 3 * len(site.row_program.split(";")) * launches))
    first = length < site.group_rows and site.gradients.any  # a pass for the statistics alone comes first
    stages = [*logits, matmul(rows, h, c, launches, dtype), Stage(0, 2 * chunk, launches)] if first else list(logits)
    operands = site.epilogue.operands
    calls = 1
    saved: Expression = 0
    if site.gradients.any:
        by_class = any(o.kind == "class" and want for o, want in zip(operands, site.gradients.operands, strict=True))
        if by_class and scheme == "logits":
            stages.append(Stage(0, chunk, launches))  # the row step's second sweep, in a kernel of its own
        if site.gradients.bias or (by_class and scheme == "exponentials"):
            stages.append(Stage(0, chunk, launches))  # sums over rows
        if schedule == "backward":
            stages.extend(logits)
            calls = 2
        else:
            saved = sum(sizes.gradient_bytes)
        if site.gradients.x:
            hidden = hidden_product(site, rows, launches)
            cut = sizes.tiles.hidden_product if isinstance(sizes, ExponentialSizes) else TORCH_MM
            if cut != TORCH_MM and not site.gradients.weight:
                # Few large tiles, and nothing to fill the gaps.
                share = max(busy(length, sizes.hidden, split, profile.processors, cut) for split in (1, 2))
                hidden = replace(hidden, flops=hidden.flops / share)
            stages.append(hidden)
        if site.gradients.weight:
            if scheme == "exponentials":  # 20 bits of the sum are read and written between the tiles' arithmetic
                stages.extend((weight_product(site, rows, launches, 0), Stage(0, 2 * c * h * 2.5, launches)))
            else:
                stages.append(weight_product(site, rows, launches, weight_sum_bytes(site, sizes, length)))
    cost = Cost(tuple(stages), sizes.transient_bytes(length), saved, opaque_calls=calls)
    why = ""
    if site.group_rows > 1 and site.gradients.any:
        why = f", whole groups of {site.group_rows} rows"
    if first:
        why = f", logits made twice: a group of {site.group_rows} rows is more than a chunk"
    return FusedCandidate(
        f"{scheme}, {length} rows a chunk, {passes(site, schedule)}{why}",
        cost,
        schedule=schedule,
        scheme=scheme,
        workspace=length * sizes.row_bytes,
    )


def _blocks(
    site: CrossEntropyHead,
    sizes: HeadSizes,
    limit: int,
    schedule: str,
    profile: DeviceProfile,
    tiles: HeadTiles,
) -> FusedCandidate:
    """Blocks as large as the limit lets them be."""
    n, h, c, dtype, wanted = site.rows, site.hidden, site.classes, site.dtype, site.gradients
    bias_bytes = bias_sum_bytes(sizes.classes, bias=wanted.bias)
    rest = limit - bias_bytes
    cut = block_sizes(sizes.rows, sizes.hidden, sizes.classes, rest, processors=profile.processors, tiles=tiles)
    rows, classes = sympy.Integer(min(cut.rows, sizes.rows)), sympy.Integer(min(cut.classes, sizes.classes))
    heights, widths = n / rows, c / classes
    losses = matmul(rows, h, c, heights, dtype)
    stages = [losses, matmul(rows, h, classes, heights * widths, dtype)]
    sum_bytes = sympy.Rational(5)  # 20 bits of a sum are read, and written
    if wanted.x:
        stages += [matmul(rows, classes, h, heights * widths, dtype), Stage(0, n * h * sum_bytes * widths, 1)]
    if wanted.weight:
        stages += [matmul(classes, rows, h, heights * widths, dtype), Stage(0, c * h * sum_bytes * heights, 1)]
    if wanted.bias:
        stages.append(Stage(0, rows * classes * dtype.itemsize, heights * widths))
    calls, saved = 1, sum(sizes.gradient_bytes)
    if schedule == "backward":
        calls, saved = 2, 0
        stages.append(losses)
    return FusedCandidate(
        f"blocks of {rows} rows and {classes} classes, {passes(site, schedule)}",
        Cost(tuple(stages), cut.bytes + bias_bytes, saved, opaque_calls=calls),
        schedule=schedule,
        scheme="blocks",
        workspace=limit,
    )

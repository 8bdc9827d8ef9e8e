"""The divergence's candidates: left dense, or fused in chunks of some length."""

from __future__ import annotations

import sympy

from structfly.config import SiteSettings
from structfly.lowering.head.chunks import accumulation_dtype
from structfly.patterns.linear_cross_entropy.menu import (
    FusedCandidate,
    HeadSizes,
    matmul,
    peak_limit,
    schedules_of,
)
from structfly.patterns.linear_divergence.site import DivergenceSite
from structfly.patterns.linear_divergence.teacher import GivenTeacher, teacher_dtype
from structfly.records import Candidate, Cost, DeviceProfile, Menu, Stage
from structfly.records.cost import Expression


def divergence_menu(site: DivergenceSite, profile: DeviceProfile, settings: SiteSettings) -> Menu:
    """Costs of leaving the divergence dense and of fusing it with several chunk lengths, and the limit they must keep:
    as for a cross-entropy's head, with the teacher's logits beside the student's where a head makes them."""
    sizes = HeadSizes(site, site.teacher_bytes)
    limit = peak_limit(sizes, ("logits",), profile, settings)
    lengths = sizes.chunk_lengths(limit, profile, "logits")
    candidates: list[Candidate] = [_dense(site)]
    for length in lengths:
        candidates.extend(
            _fused(site, sizes, length, schedule) for schedule in schedules_of(site.gradients, site.recompute)
        )
    x_bytes, weight_bytes = sizes.gradient_bytes
    return Menu(
        tuple(candidates),
        peak_limit=limit,
        own_bytes=x_bytes,
        shared_bytes={site.path.linear.weight.name: weight_bytes},
    )


def _teacher_products(site: DivergenceSite, rows: Expression, launches: Expression) -> list[Stage]:
    if isinstance(site.teacher, GivenTeacher):
        return []
    return [matmul(rows, site.teacher_hidden, site.classes, launches, teacher_dtype(site.teacher))]


def _row_bytes(site: DivergenceSite, rows: Expression) -> tuple[Expression, Expression]:
    """Bytes of the student's and of the teacher's rows."""
    entries = rows * site.classes
    return entries * site.dtype.itemsize, entries * teacher_dtype(site.teacher).itemsize


def _dense(site: DivergenceSite) -> Candidate:
    n, h, c, dtype = site.rows, site.hidden + site.rank, site.classes, site.dtype
    student, teacher = _row_bytes(site, n)
    stages = [matmul(n, h, c, 1, dtype), *_teacher_products(site, n, 1)]
    stages.append(Stage(0, 2 * (student + teacher), 1))  # the normalisers, then the terms
    if site.gradients.any:
        stages.append(Stage(0, 2 * student + teacher, 1))
        stages.extend(matmul(n, c, h, 1, dtype) for wanted in (site.gradients.x, site.gradients.weight) if wanted)
    made = student if isinstance(site.teacher, GivenTeacher) else student + teacher
    return Candidate("dense", Cost(tuple(stages), transient_bytes=made, saved_bytes=0), rewrites=False)


def _fused(site: DivergenceSite, sizes: HeadSizes, length: int, schedule: str) -> FusedCandidate:
    n, h, c, dtype = site.rows, site.hidden + site.rank, site.classes, site.dtype
    launches, rows = n / length, sympy.Integer(length)  # no candidate is longer than the example's rows
    student, teacher = _row_bytes(site, rows)
    logits = [
        matmul(rows, h, c, launches, dtype),
        *_teacher_products(site, rows, launches),
        Stage(0, 2 * student + teacher, launches),  # the row step; its later sweeps find the row in a cache
    ]
    stages, calls = list(logits), 1
    saved: Expression = 0
    if site.gradients.any:
        if schedule == "backward":
            stages.extend(logits)
            calls = 2
        else:
            saved = sum(sizes.gradient_bytes)
        if site.gradients.x:
            stages.append(matmul(rows, c, h, launches, dtype))
        if site.gradients.weight:
            total = accumulation_dtype(dtype, -(-sizes.rows // length)).itemsize
            moved = (rows * c + rows * h) * dtype.itemsize + 2 * c * h * total
            stages.append(Stage(2 * rows * c * h, moved, launches, dtype, rows))
    cost = Cost(tuple(stages), sizes.transient_bytes(length, "logits"), saved, opaque_calls=calls)
    when = {"forward": "gradients in forward", "backward": "recompute"}[schedule]
    of = "teacher given" if isinstance(site.teacher, GivenTeacher) else "teacher's head within"
    return FusedCandidate(
        f"{site.kind.kind}, {of}, {length} rows a chunk, {when if site.gradients.any else 'loss only'}",
        cost,
        schedule=schedule,
        workspace=length * sizes.row_bytes,
    )

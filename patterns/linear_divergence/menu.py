"""The divergence's candidates: left dense, or fused in chunks of some length."""

from __future__ import annotations

from typing import Protocol

import sympy
import torch

from structfly.config import SiteSettings
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
from structfly.records.cost import Expression


class DivergenceHead(Head, Protocol):
    """A student's head and its teacher.

    Attributes:
        kind_name: which divergence.
        teacher_given: the teacher is a tensor that is there, not a linear.
        teacher_dtype: of the teacher's products, or of that tensor.
        teacher_bytes: bytes that one of the teacher's entries takes in a chunk; 0 for rows that are read as they lie.
        teacher_hidden: the teacher's own H, 0 for one that is given.
    """

    @property
    def kind_name(self) -> str: ...
    @property
    def teacher_given(self) -> bool: ...
    @property
    def teacher_dtype(self) -> torch.dtype: ...
    @property
    def teacher_bytes(self) -> int: ...
    @property
    def teacher_hidden(self) -> sympy.Expr: ...


def divergence_menu(site: DivergenceHead, profile: DeviceProfile, settings: SiteSettings) -> Menu:
    """Costs of leaving the divergence dense and of fusing it with several chunk lengths, and the limit they must keep:
    as for a cross-entropy's head, with the teacher's logits beside the student's where a head makes them."""
    sizes = HeadSizes(site, site.teacher_bytes)
    limit = peak_limit([sizes], profile, settings)
    lengths = sizes.chunk_lengths(limit, profile)
    candidates: list[Candidate] = [_dense(site)]
    for length in lengths:
        candidates.extend(
            _fused(site, sizes, length, schedule) for schedule in schedules_of(site.gradients, site.recompute)
        )
    return menu_of(site, sizes, limit, candidates)


def _teacher_products(site: DivergenceHead, rows: Expression, launches: Expression) -> list[Stage]:
    if site.teacher_given:
        return []
    return [matmul(rows, site.teacher_hidden, site.classes, launches, site.teacher_dtype)]


def _row_bytes(site: DivergenceHead, rows: Expression) -> tuple[Expression, Expression]:
    """Bytes of the student's and of the teacher's rows."""
    entries = rows * site.classes
    return entries * site.dtype.itemsize, entries * site.teacher_dtype.itemsize


def _dense(site: DivergenceHead) -> Candidate:
    n, h, c, dtype = site.rows, site.hidden + site.rank, site.classes, site.dtype
    student, teacher = _row_bytes(site, n)
    stages = [matmul(n, h, c, 1, dtype), *_teacher_products(site, n, 1)]
    stages.append(Stage(0, 2 * (student + teacher), 1))  # the normalisers, then the terms
    if site.gradients.any:
        stages.append(Stage(0, 2 * student + teacher, 1))
        stages.extend(dense_gradients(site))
    made = student if site.teacher_given else student + teacher
    return Candidate("dense", Cost(tuple(stages), transient_bytes=made, saved_bytes=0), rewrites=False)


def _fused(site: DivergenceHead, sizes: HeadSizes, length: int, schedule: str) -> FusedCandidate:
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
            stages.append(hidden_product(site, rows, launches))
        if site.gradients.weight:
            stages.append(weight_product(site, rows, launches, weight_sum_bytes(site, sizes, length)))
    cost = Cost(tuple(stages), sizes.transient_bytes(length), saved, opaque_calls=calls)
    of = "teacher given" if site.teacher_given else "teacher's head within"
    return FusedCandidate(
        f"{site.kind_name}, {of}, {length} rows a chunk, {passes(site, schedule)}",
        cost,
        schedule=schedule,
        workspace=length * sizes.row_bytes,
    )

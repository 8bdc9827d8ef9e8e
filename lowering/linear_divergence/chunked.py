"""The divergence in chunks of rows: the student's logits of one chunk exist at a time, overwritten by their own
gradient, and beside them the teacher's, if a second head makes them.

Per chunk of R rows: z = x W^T (2RHC operations), t = y U^T for a teacher's hidden states y of width G (2RGC), the row
step makes losses and dz in place, dx = dz W and dW += dz^T x (4RHC): 6NHC + 2NGC in all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from structfly.lowering.head.chunks import row_stride, rows_per_chunk
from structfly.lowering.head.gradient_sums import GradientSums
from structfly.lowering.head.linear import Gradients, Linear, Wanted
from structfly.lowering.linear_divergence.rows import RowStep, RowTerms


@dataclass(frozen=True)
class Teacher:
    """The teacher's rows: made by a linear of its own, or given as (N, C)."""

    linear: Linear | None
    given: Tensor | None

    @property
    def chunk_dtype(self) -> torch.dtype | None:
        """The dtype of the chunk that has to be made, or None: rows whose classes lie together are read as they lie."""
        if self.linear is not None:
            return self.linear.x.dtype
        assert self.given is not None
        return None if self.given.stride(1) == 1 else self.given.dtype


def chunk_rows(rows: int, classes: int, dtype: torch.dtype, teacher_dtype: torch.dtype | None, workspace: int) -> int:
    """Rows whose student logits in ``dtype`` and teacher's chunk in ``teacher_dtype`` fit in ``workspace`` bytes."""
    both = dtype.itemsize + (0 if teacher_dtype is None else teacher_dtype.itemsize)
    return rows_per_chunk(rows, classes, dtype, workspace * dtype.itemsize // both)


def run_chunks(
    student: Linear,
    teacher: Teacher,
    terms: RowTerms,
    coefficient: Tensor | None,
    wanted: Wanted | None,
    workspace: int,
    row_step: RowStep,
) -> tuple[Tensor, Gradients | None]:
    """Divergences of all rows and, where ``wanted`` is given, gradients of ``sum_n coefficient_n loss_n``.

    Args:
        coefficient: (N,) in ``student.accumulation``, or None for ones.
        wanted: None computes losses alone.
        workspace: bytes that one chunk's logits of both may take.
        row_step: the row step for the device.

    Returns:
        (N,) losses in ``student.accumulation`` and the gradients.
    """
    rows, classes, dtype = student.x.shape[0], student.num_classes, student.x.dtype
    length = chunk_rows(rows, classes, dtype, teacher.chunk_dtype, workspace)
    losses = torch.empty(rows, dtype=student.accumulation, device=student.x.device)
    sums = None if wanted is None else GradientSums(student, wanted, -(-rows // length), terms.gradient_scale)
    buffer = student.x.new_empty(length, row_stride(classes))
    beside = None
    if teacher.chunk_dtype is not None:
        beside = student.x.new_empty(length, row_stride(classes), dtype=teacher.chunk_dtype)
    for start in range(0, rows, length):
        part = slice(start, min(start + length, rows))
        logits = buffer[: part.stop - start, :classes]
        student.multiply(logits, part)
        given = _teacher_rows(teacher, part, None if beside is None else beside[: part.stop - start, :classes])
        row_coefficient = None if coefficient is None else coefficient[part]
        losses[part] = row_step(logits, given, row_coefficient, terms, gradient=sums is not None)
        if sums is not None:
            sums.add(logits, part)
        del logits, given
    del buffer, beside  # before the gradients are rounded, which takes memory of its own
    return losses, None if sums is None else sums.gradients()


def _teacher_rows(teacher: Teacher, part: slice, beside: Tensor | None) -> Tensor:
    if teacher.linear is not None:
        assert beside is not None
        teacher.linear.multiply(beside, part)
        return beside
    assert teacher.given is not None
    return teacher.given[part] if beside is None else beside.copy_(teacher.given[part])

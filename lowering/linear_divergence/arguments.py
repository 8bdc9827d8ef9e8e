"""The op's arguments, once: the schema and the tuple that every part of the op reads them through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from structfly.lowering.head.epilogue import parse_epilogue
from structfly.lowering.head.linear import DIFFERENTIABLE, Linear, Wanted
from structfly.lowering.linear_divergence.chunked import Teacher
from structfly.lowering.linear_divergence.rows import RowTerms, gradient_scale

# The ABI version goes up with any change of the schema, of the fakes or of the autograd formula, so that a compile
# cache filled by another version is never served.
NAME = "structfly::linear_divergence_v1"
BACKWARD_NAME = "structfly::linear_divergence_backward_v1"

ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? adapter_x, Tensor? adapter_weight, float adapter_scale, "
    "str epilogue, Tensor? teacher, str teacher_form, Tensor? teacher_x, Tensor? teacher_weight, "
    "Tensor? teacher_bias, str teacher_epilogue, Tensor? row_weight, SymInt num_classes, str kind, float beta, "
    "float label_smoothing, str reduction, ScalarType loss_dtype, bool[] gradients, str schedule, int workspace, "
    "bool autocast"
)


class Arguments(NamedTuple):
    """The op's arguments, in the schema's order; meanings as in
    :func:`~structfly.lowering.linear_divergence.reference.linear_divergence_reference`, and:

    ``loss_dtype`` is the dtype of the returned loss, ``gradients`` says for x, weight, bias, adapter_x and
    adapter_weight whether a gradient will be asked for (the teacher has none), ``schedule`` is "forward" or "backward",
    ``workspace`` the bytes one chunk of the student's and the teacher's logits may take, and ``autocast`` whether an
    autocast region around the call casts what the linears multiply, as it does for ``linear``.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    adapter_x: Tensor | None
    adapter_weight: Tensor | None
    adapter_scale: float
    epilogue: str
    teacher: Tensor | None
    teacher_form: str
    teacher_x: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    teacher_epilogue: str
    row_weight: Tensor | None
    num_classes: int
    kind: str
    beta: float
    label_smoothing: float
    reduction: str
    loss_dtype: torch.dtype
    gradients: Sequence[bool]
    schedule: str
    workspace: int
    autocast: bool

    @property
    def student(self) -> Linear:
        return Linear(
            x=self.x,
            weight=self.weight,
            bias=self.bias,
            adapter_x=self.adapter_x,
            adapter_weight=self.adapter_weight,
            adapter_scale=self.adapter_scale,
            epilogue=parse_epilogue(self.epilogue),
            operands=(),
            num_classes=self.num_classes,
        )

    @property
    def teacher_rows(self) -> Teacher:
        if self.teacher_x is None or self.teacher_weight is None:
            return Teacher(None, self.teacher)
        linear = Linear(
            x=self.teacher_x,
            weight=self.teacher_weight,
            bias=self.teacher_bias,
            adapter_x=None,
            adapter_weight=None,
            adapter_scale=1.0,
            epilogue=parse_epilogue(self.teacher_epilogue),
            operands=(),
            num_classes=self.num_classes,
        )
        return Teacher(linear, None)

    @property
    def row_terms(self) -> RowTerms:
        """What the rows share, restricted to the live classes."""
        classes = slice(self.num_classes)
        return RowTerms(
            kind=self.kind,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            epilogue=parse_epilogue(self.epilogue),
            bias=None if self.bias is None else self.bias[classes],
            teacher_form=self.teacher_form,
            teacher_epilogue=parse_epilogue(self.teacher_epilogue),
            teacher_bias=None if self.teacher_bias is None else self.teacher_bias[classes],
            gradient_scale=gradient_scale(self.x.dtype),
        )

    @property
    def differentiable(self) -> list[Tensor | None]:
        """The arguments in the order of ``gradients``."""
        return [getattr(self, name) for name in DIFFERENTIABLE]

    @property
    def wanted(self) -> Wanted:
        return Wanted.of(self.gradients)

    @property
    def wanted_in_forward(self) -> Wanted | None:
        return self.wanted if self.schedule == "forward" and self.wanted.any else None

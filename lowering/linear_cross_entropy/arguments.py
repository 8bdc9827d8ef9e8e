"""The op's arguments, once: the schema and the tuple that every part of the op reads them through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from structfly.lowering.head.epilogue import parse_epilogue
from structfly.lowering.head.linear import DIFFERENTIABLE, Wanted
from structfly.lowering.linear_cross_entropy.chunked import Head

# The ABI version goes up with any change of the schema, of the fakes or of the autograd formula, so that a compile
# cache filled by another version is never served.
NAME = "structfly::linear_cross_entropy_v2"
BACKWARD_NAME = "structfly::linear_cross_entropy_backward_v2"

ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight, Tensor? row_weight, "
    "Tensor? adapter_x, Tensor? adapter_weight, float adapter_scale, str epilogue, Tensor[] operands, "
    "SymInt num_classes, int? ignore_index, float label_smoothing, str reduction, ScalarType loss_dtype, "
    "bool[] gradients, str schedule, str scheme, int workspace, bool autocast"
)
OPERAND_GRADIENTS = "Tensor[] grad_operands"


class Arguments(NamedTuple):
    """The op's arguments, in the schema's order; meanings as in
    :func:`~structfly.lowering.linear_cross_entropy.reference.linear_cross_entropy_reference`, and:

    ``loss_dtype`` is the dtype of the returned loss, ``gradients`` says for x, weight, bias, adapter_x,
    adapter_weight and each of the operands whether a gradient will be asked for, ``schedule`` is "forward" or
    "backward", ``scheme`` is "logits" (:mod:`~structfly.lowering.linear_cross_entropy.chunked`) or "exponentials"
    (:mod:`~structfly.lowering.linear_cross_entropy.exponentials`), ``workspace`` the bytes one chunk of either may
    take, and ``autocast`` whether an autocast region around the call casts what the
    linear multiplies, as it does for ``linear`` (a rewrite has put the linear's own casts into the graph, and the loss
    may stand in another region: it says False).
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    class_weight: Tensor | None
    row_weight: Tensor | None
    adapter_x: Tensor | None
    adapter_weight: Tensor | None
    adapter_scale: float
    epilogue: str
    operands: Sequence[Tensor]
    num_classes: int
    ignore_index: int | None
    label_smoothing: float
    reduction: str
    loss_dtype: torch.dtype
    gradients: Sequence[bool]
    schedule: str
    scheme: str
    workspace: int
    autocast: bool

    @property
    def head(self) -> Head:
        return Head(
            x=self.x,
            weight=self.weight,
            bias=self.bias,
            target=self.target,
            class_weight=self.class_weight,
            adapter_x=self.adapter_x,
            adapter_weight=self.adapter_weight,
            adapter_scale=self.adapter_scale,
            epilogue=parse_epilogue(self.epilogue),
            operands=self.operands,
            num_classes=self.num_classes,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )

    @property
    def wanted(self) -> Wanted:
        return Wanted.of(self.gradients)

    @property
    def wanted_in_forward(self) -> Wanted | None:
        return self.wanted if self.schedule == "forward" and self.wanted.any else None

    @property
    def differentiable(self) -> list[Tensor | None]:
        """The arguments in the order of ``gradients``."""
        return [*(getattr(self, name) for name in DIFFERENTIABLE), *self.operands]

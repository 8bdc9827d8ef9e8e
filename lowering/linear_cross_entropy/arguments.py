"""The op's arguments and outputs, once: the schema and the tuples that every part of the op reads them through."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from structfly.lowering.head.chunks import rows_that_fit
from structfly.lowering.head.epilogue import parse_epilogue
from structfly.lowering.head.linear import DIFFERENTIABLE, Wanted
from structfly.lowering.linear_cross_entropy.chunked import Head
from structfly.lowering.linear_cross_entropy.row_program import parse_row_program

# The ABI version goes up with any change of the schema, of the fakes or of the autograd formula, so that a compile
# cache filled by another version is never served.
NAME = "structfly::linear_cross_entropy_v4"
BACKWARD_NAME = "structfly::linear_cross_entropy_backward_v4"

ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? target, Tensor? choices, Tensor? class_weight, Tensor? row_weight, "
    "Tensor? adapter_x, Tensor? adapter_weight, float adapter_scale, str epilogue, Tensor[] operands, "
    "SymInt num_classes, int? ignore_index, float label_smoothing, str reduction, str statistics, str row_loss, "
    "Tensor[] row_operands, SymInt[] row_group, ScalarType loss_dtype, bool[] gradients, str schedule, str scheme, "
    "int workspace, bool autocast"
)
# What may stand in ``statistics``, and what of it can be differentiated.
STATISTICS = ("losses", "lse", "entropy", "argmax", "chosen")
DIFFERENTIABLE_STATISTICS = ("lse", "entropy", "chosen")
# What the op returns beside gradients, and what the second op takes beside arguments.
RESULTS = f"Tensor loss, {', '.join(f'Tensor {name}' for name in STATISTICS)}, Tensor factor"
UPSTREAM = ", ".join(f"Tensor? grad_{name}" for name in ("loss", *DIFFERENTIABLE_STATISTICS))
OPERAND_GRADIENTS = "Tensor[] grad_operands"


class Outputs(NamedTuple):
    """What the op returns.

    ``loss`` () or, for the reduction "none", (N,), in ``loss_dtype``; then, empty where ``statistics`` does not name
    it, of every row, in float32 (float64 for float64 inputs): ``losses`` beside a reduced loss, ``lse``, ``entropy``
    (N,), ``argmax`` (N,) int64, ``chosen`` (N, K); then the factor that gradients wait for, and the gradients.
    """

    loss: Tensor
    losses: Tensor
    lse: Tensor
    entropy: Tensor
    argmax: Tensor
    chosen: Tensor
    factor: Tensor
    grad_x: Tensor
    grad_weight: Tensor
    grad_bias: Tensor
    grad_adapter_x: Tensor
    grad_adapter_weight: Tensor
    grad_operands: list[Tensor]


class Arguments(NamedTuple):
    """The op's arguments, in the schema's order; meanings as in
    :func:`~structfly.lowering.linear_cross_entropy.reference.linear_cross_entropy_reference`, and:

    ``statistics`` names what is returned beside the loss, of :data:`STATISTICS`, joined by commas (those of
    :data:`DIFFERENTIABLE_STATISTICS` are differentiable with the schedule "backward"), ``row_loss`` is "" or a program
    that makes the loss of each row, or of each group of rows of the shape ``row_group``, of their statistics and of
    ``row_operands``, without gradients: () each, or (N,), or (groups, *sizes) with the group's sizes or 1
    (:mod:`~structfly.lowering.linear_cross_entropy.row_program`), ``loss_dtype`` is the dtype of the returned loss,
    ``gradients`` says for x, weight, bias, adapter_x, adapter_weight and each of the operands whether a gradient will
    be asked for, ``schedule`` is "forward" or "backward", ``scheme`` is "logits"
    (:mod:`~structfly.lowering.linear_cross_entropy.chunked`), "exponentials"
    (:mod:`~structfly.lowering.linear_cross_entropy.exponentials`) or "blocks"
    (:mod:`~structfly.lowering.linear_cross_entropy.blocks`), ``workspace`` the bytes one chunk of the first two, or all
    of the third, may take (where that does not hold a group's rows, a pass of its own makes the statistics), and
    ``autocast`` whether an autocast region around the call casts what the linear multiplies, as it does for ``linear``
    (a rewrite has put the linear's own casts into the graph, and the loss may stand in another region: it says False).
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor | None
    choices: Tensor | None
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
    statistics: str
    row_loss: str
    row_operands: Sequence[Tensor]
    row_group: Sequence[int]
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
            target=self.x.new_empty(0, dtype=torch.int64) if self.target is None else self.target,
            choices=self.choices,
            class_weight=self.class_weight,
            adapter_x=self.adapter_x,
            adapter_weight=self.adapter_weight,
            adapter_scale=self.adapter_scale,
            epilogue=parse_epilogue(self.epilogue),
            operands=self.operands,
            num_classes=self.num_classes,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            asked=self.asked,
        )

    @property
    def named_statistics(self) -> tuple[str, ...]:
        """The names in ``statistics``."""
        return tuple(name for name in self.statistics.split(",") if name)

    @property
    def asked(self) -> tuple[str, ...]:
        """What the row step makes.  Losses of rows that weigh 0 are made where something else is asked as well."""
        names = ["lse" if name == "losses" else name for name in self.named_statistics]
        if self.row_loss:  # of which the gradients need lse
            names.extend(("lse", *parse_row_program(self.row_loss).statistics))
        return tuple(dict.fromkeys((*(("loss",) if self.target is not None else ()), *names)))

    @property
    def statistics_first(self) -> bool:
        """Whether a pass of its own makes the statistics that a group's loss takes: no chunk holds a group."""
        group = math.prod(self.row_group)
        return group > 1 and rows_that_fit(self.num_classes, self.x.dtype, self.workspace) < group

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

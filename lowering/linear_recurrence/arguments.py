"""The op's arguments and outputs, once: the schema and the tuples that every part of the op reads them through.

It is called in two forms, with a tensor for every sequence, or with all sequences side by side in one.  What computes
it sees the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The ABI version goes up with any change of the schema, of the fakes or of the autograd formula, so that a compile
# cache filled by another version is never served.
NAME = "structfly::linear_recurrence_v1"
BACKWARD_NAME = "structfly::linear_recurrence_backward_v1"

ARGUMENTS = (
    "Tensor gate, Tensor input, Tensor? input_gate, Tensor? output_gate, Tensor? initial, Tensor? reset, "
    "Tensor? offsets, bool complement, bool sigmoid, bool tanh, bool reverse, bool keep"
)
RESULTS = "Tensor output, Tensor final, Tensor kept"
DIFFERENTIABLE = ("gate", "input", "input_gate", "output_gate", "initial")
"""The arguments that have gradients, in the order of the backward's ``wanted``."""
UPSTREAM = "Tensor? grad_output, Tensor? grad_final, Tensor states"
"""What the backward takes before the op's arguments; ``states`` are those of :func:`states_for_backward`."""

STEPS_KEPT = {"aten": 1024, "triton": 256}
"""A state is kept for the backward every so many steps, in each lowering: those of a block in ATen, of a chunk in
Triton, where 4 bytes in 256 steps are 1/128 of the states in bfloat16.
"""


class Outputs(NamedTuple):
    """What the op returns.

    ``output`` (B, T, D) in the dtype and layout of ``input``; ``final`` (B, D), or (N, D) of N packed sequences, the
    states after the last steps, and ``kept`` (rows, D), states of which the backward makes the others again, empty
    without ``keep``: both float32, float64 for float64 inputs.
    """

    output: Tensor
    final: Tensor
    kept: Tensor


class Gradients(NamedTuple):
    """Where gradients go, in the order of :data:`DIFFERENTIABLE`, of any strides; None where not wanted."""

    gate: Tensor | None
    input: Tensor | None
    input_gate: Tensor | None
    output_gate: Tensor | None
    initial: Tensor | None


class Arguments(NamedTuple):
    """The op's arguments, in the schema's order; meanings as in
    :func:`~structfly.lowering.linear_recurrence.reference.linear_recurrence_reference`, and ``keep``: whether states
    are kept for a backward, which otherwise makes them first."""

    gate: Tensor
    input: Tensor
    input_gate: Tensor | None
    output_gate: Tensor | None
    initial: Tensor | None
    reset: Tensor | None
    offsets: Tensor | None
    complement: bool
    sigmoid: bool
    tanh: bool
    reverse: bool
    keep: bool

    @property
    def state_dtype(self) -> torch.dtype:
        """Of the states, whatever the inputs have."""
        return torch.float64 if self.input.dtype == torch.float64 else torch.float32

    @property
    def sequences(self) -> int:
        """How many there are, each with a state of its own."""
        return self.input.shape[0] if self.offsets is None else self.offsets.shape[0] - 1

    @property
    def separate(self) -> Arguments:
        """A tensor for every sequence."""
        return self

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """The arguments in the order of :data:`DIFFERENTIABLE`."""
        return self.gate, self.input, self.input_gate, self.output_gate, self.initial

    def gradients(self, made: Sequence[Tensor | None]) -> Gradients:
        """The gradients of the differentiable arguments as those of :attr:`separate` ones."""
        return Gradients(*made)


JOINT_NAME = "structfly::joint_linear_recurrence_v1"
JOINT_BACKWARD_NAME = "structfly::joint_linear_recurrence_backward_v1"
JOINT_ARGUMENTS = (
    "Tensor joint, str order, Tensor? initial, Tensor? reset, Tensor? offsets, "
    "bool complement, bool sigmoid, bool tanh, bool reverse, bool keep"
)
JOINT_DIFFERENTIABLE = ("joint", "initial")
LETTERS = {"f": "gate", "z": "input", "i": "input_gate", "o": "output_gate"}
"""What a letter of ``order`` stands for, in the order of :data:`DIFFERENTIABLE`."""


class JointArguments(NamedTuple):
    """The arguments where gates and input lie side by side, as a layer's projection makes them: ``joint`` is
    (B, T, D times the letters), and ``order`` has one of :data:`LETTERS` for every D channels, "f" and "z" among them.

    The backward writes all their gradients into one tensor.  Of slices, each with a gradient of its own, autograd
    would have to join them.
    """

    joint: Tensor
    order: str
    initial: Tensor | None
    reset: Tensor | None
    offsets: Tensor | None
    complement: bool
    sigmoid: bool
    tanh: bool
    reverse: bool
    keep: bool

    @property
    def separate(self) -> Arguments:
        """A tensor for every sequence, which is a slice of ``joint``."""
        given: dict[str, Any] = {**self._asdict(), **self._parts(self.joint)}
        return Arguments._make(map(given.get, Arguments._fields))

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """The arguments in the order of :data:`JOINT_DIFFERENTIABLE`."""
        return self.joint, self.initial

    def gradients(self, made: Sequence[Tensor | None]) -> Gradients:
        """The gradients of the differentiable arguments as those of :attr:`separate` ones."""
        joint, initial = made
        parts = {} if joint is None else self._parts(joint)
        return Gradients._make([*map(parts.get, LETTERS.values()), initial])

    def _parts(self, joint: Tensor) -> dict[str, Tensor]:
        width = joint.shape[2] // len(self.order)
        return {LETTERS[letter]: joint.narrow(2, at * width, width) for at, letter in enumerate(self.order)}


PROJECTED_NAME = "structfly::projected_linear_recurrence_v1"
PROJECTED_ARGUMENTS = (
    "Tensor inputs, Tensor? beside, Tensor weight, Tensor? bias, Tensor? initial, str order, int window, bool reverse, "
    "bool time_first"
)
PROJECTED_RESULTS = "Tensor output, Tensor final"


class ProjectedArguments(NamedTuple):
    """The arguments where a linear map makes gates and input, as in a quasi-recurrent layer.

    ``inputs`` (B, S, I), and ``beside`` (B, K, I) the steps before them, with ``reverse`` those after them: of all
    these, S + K = T + window - 1, what the map takes at step t are the steps t, ..., t + window - 1, one after another.
    ``weight`` (D times the letters, window I) in their dtype, ``bias`` (D times the letters,), and ``order`` as in
    :class:`JointArguments`.  Gates are sigmoids and z is a tanh; without "i" w is 1 - f.  With ``time_first`` h lies in
    memory as (T, B, D) does.
    """

    inputs: Tensor
    beside: Tensor | None
    weight: Tensor
    bias: Tensor | None
    initial: Tensor | None
    order: str
    window: int
    reverse: bool
    time_first: bool

    @property
    def steps(self) -> int:
        """T."""
        return self.inputs.shape[1] + self._beside - self.window + 1

    @property
    def apart(self) -> int:
        """Steps whose windows see what lies beside the inputs."""
        return min(self._beside, self.steps)

    @property
    def _beside(self) -> int:
        return 0 if self.beside is None else self.beside.shape[1]

    @property
    def width(self) -> int:
        """D."""
        return self.weight.shape[0] // len(self.order)

    @property
    def state_dtype(self) -> torch.dtype:
        """As of :class:`Arguments`."""
        return torch.float64 if self.inputs.dtype == torch.float64 else torch.float32

    def empty_output(self) -> Tensor:
        """Where h goes."""
        batch = self.inputs.shape[0]
        if self.time_first:
            return self.inputs.new_empty(self.steps, batch, self.width).transpose(0, 1)
        return self.inputs.new_empty(batch, self.steps, self.width)

    def joint(self, projected: Tensor, initial: Tensor | None) -> JointArguments:
        """The recurrence of what the map made of some steps, from such states on."""
        return JointArguments(
            projected, self.order, initial, None, None, "i" not in self.order, True, True, self.reverse, False
        )


def lowering_of(input: Tensor) -> str:
    """Which lowering a call takes."""
    return "triton" if input.is_cuda and input.dtype != torch.float64 else "aten"


def states_are_output(call: Arguments) -> bool:
    """Whether the backward reads the states from the output, and none are kept."""
    return call.keep and lowering_of(call.input) == "triton" and call.output_gate is None


def states_for_backward(call: Arguments, made: Outputs) -> Tensor:
    """The states that the backward reads, or of which it makes the others again."""
    return made.output if states_are_output(call) else made.kept


def kept_rows(call: Arguments) -> int:
    """Rows of ``kept``."""
    batch, length, _ = call.input.shape
    lowering = lowering_of(call.input)
    if not call.keep or states_are_output(call):
        return 0
    steps = STEPS_KEPT[lowering]
    if call.offsets is not None and lowering == "triton":
        return length // steps + call.sequences  # chunks end where sequences do: there are no more than these
    return batch * (-(-length // steps))

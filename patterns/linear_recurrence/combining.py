"""What the function of an ``associative_scan`` does to each of its leaves.

A scan may be done in any order if its function is associative, and is then what its steps are one after another, the
first of which takes the first element as it is.  That a function is associative is proved and not believed.  It is,
with the right operand's values primed, for

    a a'                      a product of gates
    b + b'                    a sum
    a' b + b'                 the states that a product of gates has beside it
    exp(s') b + b'            the same, of gates whose logarithms are a sum s
    r | r'                    whether there was a reset

and for the first four where r' is false with, where it is true, the right operand alone; a product or a sum that states
are made with may be reset or not, for where there was a reset nobody multiplies by it.  Leaves stand in any order and
further ones beside them, as long as those that are read are made of nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx

from structfly.patterns.linear_recurrence.affine import Affine, Obstacle, read_affine
from structfly.patterns.linear_recurrence.expressions import ONE, ZERO, Expression, Operation, Part, State, binary
from structfly.patterns.linear_recurrence.operations import expressions


class Leaf(NamedTuple):
    """A leaf as a recurrence of the leaves' elements, :class:`Part` of their places, and the state before the first."""

    step: Affine
    initial: float


class Combined:
    """The leaves of a scan.

    Args:
        inputs: of its function, all leaves on the left, then all on the right.
        outputs: of its function.
        sequences: examples of what is scanned, time first.
    """

    def __init__(
        self, inputs: Sequence[fx.Node], outputs: Sequence[fx.Node], sequences: Sequence[Tensor | None]
    ) -> None:
        self._inputs, self._outputs, self._sequences = inputs, outputs, sequences

    def recurrence(self, place: int) -> Leaf | str:
        """The leaf at ``place``, or why it is no recurrence."""
        step = self._step(place)
        if isinstance(step, Obstacle):
            return f"leaf {place} of its function: {step.reason}"
        own = Part(place)
        if step.reset is not None:
            reason = self._why_no_reset(step.reset, place)
            if reason:
                return reason
        if step.input == own and self._is_of_gates(step):
            return Leaf(step, 0.0)
        if step == _product(place, step.reset):
            return Leaf(step, 1.0)
        return (
            f"leaf {place} of its function is not shown to be associative: it is neither a a', b + b' nor a' b + b' "
            "with a leaf a a', or is reset in another way than that leaf"
        )

    def _step(self, place: int) -> Affine | Obstacle:
        """The leaf as an affine function of its left operand; of the other leaves' left ones are parts behind all."""
        count = len(self._outputs)
        left: dict[fx.Node, Expression] = {self._inputs[other]: Part(count + other) for other in range(count)}
        right = {self._inputs[count + other]: Part(other) for other in range(count)}
        return read_affine(expressions({**left, **right, self._inputs[place]: State()})(self._outputs[place]))

    def _is_of_gates(self, step: Affine) -> bool:
        """Whether the gate of a state is 1, a leaf that is a product, or the exponential of one that is a sum."""
        gate = step.gate
        if gate == ONE:
            return True
        if isinstance(gate, Part) and gate.number < len(self._outputs):
            other = self._step(gate.number)
            return other in (_product(gate.number, None), _product(gate.number, step.reset))
        if isinstance(gate, Operation) and gate.op == "exp" and isinstance(gate["input"], Part):
            logarithm = gate["input"]
            return logarithm.number < len(self._outputs) and self._step(logarithm.number) in (
                Affine(ONE, logarithm),
                Affine(ONE, logarithm, step.reset),
            )
        return False

    def _why_no_reset(self, reset: Expression, place: int) -> str:
        count = len(self._outputs)
        if not isinstance(reset, Part) or reset.number >= count:
            return f"leaf {place} of its function is reset where no leaf on the right says so"
        number = reset.number
        left: dict[fx.Node, Expression] = {each: Part(count + other) for other, each in enumerate(self._inputs[:count])}
        right = {each: Part(other) for other, each in enumerate(self._inputs[count:])}
        carried = expressions({**left, **right})(self._outputs[number])
        mine, before = Part(number), Part(count + number)
        mask, states = self._sequences[number], self._sequences[place]
        assert mask is not None
        assert states is not None
        rows = states.ndim > 2
        if mask.dtype != torch.bool or carried not in (binary("or", before, mine), binary("or", mine, before)):
            return f"leaf {number} of its function says where leaf {place} is reset, and is not r | r' of masks"
        channels = range(max((2 if rows else 1) - (states.ndim - mask.ndim), 1), mask.ndim)
        if any(mask.shape[dim] != 1 and not (rows and mask.stride(dim) == 0) for dim in channels):
            return (
                f"leaf {number} of its function is not known to reset all channels of a row; expand a mask that has "
                "one for each row"
            )
        return ""


def _product(place: int, reset: Expression | None) -> Affine:
    """Of gates: where there is a reset, the right one alone."""
    own = Part(place)
    if reset is None:
        return Affine(own, ZERO)
    chosen = Operation("where", (("condition", reset), ("input", own), ("other", ZERO)))
    return Affine(own, chosen, reset)

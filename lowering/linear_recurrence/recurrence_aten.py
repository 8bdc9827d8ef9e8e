"""The recurrence in ATen, for CPUs and for float64: blocks of time that fit a cache, in which chunks run side by side.

A block of L C steps lies in L rows, of which row k has the k-th step of each of C chunks, of all channels:

1. every chunk's product of gates, and its last state if it began with 0, in L operations on rows,
2. the states that enter the chunks, in C operations on a state,
3. every chunk again, from the state that enters it, in L operations on rows.

Few and wide operations take the place of many narrow ones.  Inputs of any layout and dtype are brought into the rows'
by the copy that every block begins with.  Within a chunk the operations are those of the loop.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from structfly.lowering.linear_recurrence.arguments import Arguments, Gradients, Outputs, kept_rows
from structfly.lowering.linear_recurrence.blocks import Block, Packed, blocks_of, parts


def forward(call: Arguments) -> Outputs:
    """Fulfils the op's contract."""
    batch, length, width = call.input.shape
    output = torch.empty_like(call.input)
    if call.initial is None:
        final = call.input.new_zeros(call.sequences, width, dtype=call.state_dtype)
    else:
        final = call.initial.to(call.state_dtype, copy=True, memory_format=torch.contiguous_format)
    kept = final.new_empty(kept_rows(call), width)
    packed = Packed.of(call)
    for part in parts((batch, length, width)):
        state = final[part] if packed is None else final.new_zeros(1, width)[:, part[1]]
        for block in blocks_of(part, length, reverse=call.reverse):
            if call.keep:
                kept.view(batch, -1, width)[part[0], block.number, part[1]] = state
            run = BlockRun(call, block, packed)
            state = run.forward(state)
            if packed is not None:
                number, steps = packed.inside(packed.last, block)
                final[number, part[1]] = run.states[block.at(steps)]
            block.write(run.output(), output)
        if packed is None:
            final[part] = state
    return Outputs(output, final, kept)


def backward(
    call: Arguments, kept: Tensor, grad_output: Tensor | None, grad_final: Tensor | None, made: Gradients
) -> None:
    """Write the gradients where ``made`` says; derivation in :mod:`structfly.lowering.linear_recurrence.op`."""
    batch, length, width = call.input.shape
    ends = kept.new_zeros(call.sequences, width)  # e after the last steps, and in its place e before the first ones
    if grad_final is not None:
        ends.copy_(grad_final)
    packed = Packed.of(call)
    for part in parts((batch, length, width)):
        adjoint = ends[part] if packed is None else ends.new_zeros(1, width)[:, part[1]]
        for block in blocks_of(part, length, reverse=not call.reverse):
            run = BlockRun(call, block, packed)
            run.forward(kept.view(batch, -1, width)[part[0], block.number, part[1]])
            adjoint = run.backward(grad_output, adjoint, ends)
            run.write_gradients(made)
        if packed is None:
            ends[part] = adjoint
    if made.initial is not None:
        made.initial.copy_(ends)


class Gate:
    """A gate's rows, and what its gradient is multiplied by to become that of what was given: with a sigmoid,
    f sigmoid(-y).

    ``open`` is what the gate is where rows are filled up, 1 or 0.
    """

    def __init__(self, call: Arguments, block: Block, source: Tensor, *, open: bool) -> None:
        self._inverse: Tensor | None = None
        if call.sigmoid:
            self._inverse = block.read(source, math.inf if open else -math.inf, call.state_dtype)
            self.rows = torch.sigmoid(self._inverse)
            self._inverse.neg_().sigmoid_()
        else:
            self.rows = block.read(source, float(open), call.state_dtype)

    @property
    def complement(self) -> Tensor:
        """1 - f."""
        return 1.0 - self.rows if self._inverse is None else self._inverse

    def pull_back(self, gradient: Tensor) -> Tensor:
        """The gradient of what was given, in the place of that of the gate."""
        return gradient if self._inverse is None else gradient.mul_(self.rows).mul_(self._inverse)


class BlockRun:
    """The recurrence and its adjoint over one block."""

    def __init__(self, call: Arguments, block: Block, packed: Packed | None) -> None:
        self.call, self.block, self.packed = call, block, packed
        self.gate = Gate(call, block, call.gate, open=True)
        self.input = block.read(call.input, 0.0, call.state_dtype)
        if call.tanh:
            self.input.tanh_()
        self.input_gate = None if call.input_gate is None else Gate(call, block, call.input_gate, open=False)
        self.output_gate = None if call.output_gate is None else Gate(call, block, call.output_gate, open=False)
        self.weight = self.gate.complement if call.complement else None
        if self.input_gate is not None:
            self.weight = self.input_gate.rows
        self.reset = self._reset()
        self.order = range(block.chunk)[:: -1 if call.reverse else 1]
        self.chunk_order = range(block.chunks)[:: -1 if call.reverse else 1]

    def _reset(self) -> Tensor | None:
        """Steps that take no state from the step before, (L, sequences, C, 1), or None where there are none."""
        block = self.block
        where = [] if self.packed is None else [self.packed.begins]
        where += [] if self.call.reset is None else [self.call.reset]
        rows = [block.read_mask(each) for each in where]
        found = rows[0] | rows[-1] if rows else None
        return found if found is not None and bool(found.any()) else None

    # ------------------------------------------------------------------------------------------------------- forward

    def forward(self, state: Tensor) -> Tensor:
        """Make the states c from the one that enters the block; returns the one that leaves it."""
        self.states = self.input.clone() if self.weight is None else self.input * self.weight
        if begun := self._begun():  # f_t c_0 is part of what the step adds
            _, at, given = begun
            self.states[at] += self.gate.rows[at] * given
        self.entering = before = self._entering(state)
        for k in self.order:
            if self.reset is not None:
                before = before.masked_fill(self.reset[k], 0.0)
            before = self.states[k].addcmul_(self.gate.rows[k], before)
        return before[:, self.chunk_order[-1]].clone()  # the rows may become the output

    def _entering(self, state: Tensor) -> Tensor:
        """The states that enter the chunks, (sequences, C, channels)."""
        if self.block.chunks == 1:
            return state.unsqueeze(1)
        local, product = torch.zeros_like(self.states[0]), torch.ones_like(self.states[0])
        for k in self.order:
            if self.reset is not None:
                local.masked_fill_(self.reset[k], 0.0)
            torch.addcmul(self.states[k], self.gate.rows[k], local, out=local)
            product.mul_(self.gate.rows[k])
        return self._across_chunks(local, product, state, self.chunk_order)

    def _across_chunks(self, local: Tensor, product: Tensor, state: Tensor, order: range) -> Tensor:
        """What enters each chunk, where ``state`` enters the first and a chunk makes ``local + product s`` of s."""
        entering = torch.empty_like(local)
        broken = None if self.reset is None else self.reset.any(0)  # makes `local`, even where the other term is nan
        for c in order:
            entering[:, c] = state
            state = torch.addcmul(local[:, c], product[:, c], state)
            if broken is not None:
                state = torch.where(broken[:, c], local[:, c], state)
        return entering

    def _begun(self) -> tuple[Tensor, tuple[Tensor, int, Tensor], Tensor] | None:
        """Packed sequences that begin in the block and take their initial state, where, and that state."""
        if self.packed is None or self.call.initial is None:
            return None
        number, steps = self.packed.inside(self.packed.first, self.block)
        if self.call.reset is not None:
            takes = ~self.call.reset[0, steps + self.block.steps.start]
            number, steps = number[takes], steps[takes]
        given = self.call.initial[number, self.block.channels].to(self.call.state_dtype)
        return number, self.block.at(steps), given

    def output(self) -> Tensor:
        """h, in the place of c."""
        return self.states if self.output_gate is None else self.states.mul_(self.output_gate.rows)

    # ------------------------------------------------------------------------------------------------------ backward

    def backward(self, grad_output: Tensor | None, adjoint: Tensor, ends: Tensor) -> Tensor:
        """Make the gradients G of the states from the e that enters the block from the other side; returns the one that
        leaves it.  Packed sequences have theirs in ``ends``."""
        block, gate, dtype = self.block, self.gate.rows, self.call.state_dtype
        self.upstream = torch.zeros_like(gate) if grad_output is None else block.read(grad_output, 0.0, dtype)
        self.adjoint = self.upstream.clone()
        if self.output_gate is not None:
            self.adjoint.mul_(self.output_gate.rows)
        if self.packed is not None:
            number, steps = self.packed.inside(self.packed.last, block)
            self.adjoint[block.at(steps)] += ends[number, block.channels]
        passed = self._passed(adjoint)
        for k in reversed(self.order):
            self.adjoint[k].add_(passed)
            passed = self.adjoint[k] * gate[k]
            if self.reset is not None:
                passed.masked_fill_(self.reset[k], 0.0)
        if self.packed is not None:
            number, _ = self.packed.inside(self.packed.first, block)
            ends[number, block.channels] = 0.0  # but for those that take their initial state
            if begun := self._begun():
                number, at, _ = begun
                ends[number, block.channels] = self.adjoint[at] * gate[at]
        return passed[:, self.chunk_order[0]]

    def _passed(self, adjoint: Tensor) -> Tensor:
        """The e that enter the chunks from the other side."""
        if self.block.chunks == 1:
            return adjoint.unsqueeze(1)
        local, product = torch.zeros_like(self.adjoint[0]), torch.ones_like(self.adjoint[0])
        for k in reversed(self.order):
            local.add_(self.adjoint[k]).mul_(self.gate.rows[k])
            product.mul_(self.gate.rows[k])
            if self.reset is not None:
                local.masked_fill_(self.reset[k], 0.0)
        return self._across_chunks(local, product, adjoint, self.chunk_order[::-1])

    def write_gradients(self, made: Gradients) -> None:
        """Put the block's part where it belongs; changes the rows."""
        block = self.block
        if made.output_gate is not None and self.output_gate is not None:
            block.write(self.output_gate.pull_back(self.upstream * self.states), made.output_gate)
        if made.gate is not None:
            gradient = self._before()
            if self.call.complement:
                gradient.sub_(self.input)
            block.write(self.gate.pull_back(gradient.mul_(self.adjoint)), made.gate)
        if made.input_gate is not None and self.input_gate is not None:
            block.write(self.input_gate.pull_back(self.adjoint * self.input), made.input_gate)
        if made.input is not None:
            gradient = self.adjoint if self.weight is None else self.adjoint.mul_(self.weight)
            if self.call.tanh:
                gradient.mul_(1.0 - self.input * self.input)
            block.write(gradient, made.input)

    def _before(self) -> Tensor:
        """The states that the steps take."""
        before = torch.empty_like(self.states)
        before[self.order[0]] = self.entering
        if self.call.reverse:
            before[:-1] = self.states[1:]
        else:
            before[1:] = self.states[:-1]
        if self.reset is not None:
            before.masked_fill_(self.reset, 0.0)
        if begun := self._begun():
            _, at, given = begun
            before[at] = given
        return before

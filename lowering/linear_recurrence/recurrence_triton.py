"""The recurrence as generated Triton kernels, parallel over time, with the same bits every time.

1. Every chunk of time is summarized: it makes ``local + product s`` of the state s that enters it.
2. These are a recurrence themselves, with the chunks as steps: it is run in the same way, until a sequence has no more
   than one chunk.  It gives the state that leaves each chunk.
3. Every chunk is gone through again, from the state that enters it.

Forward reads f and b twice and writes h once, 5 numbers a step and channel where 3 must move.  Backward summarizes the
adjoint (reads f and g) and goes through every chunk again (reads f, b and g, writes two gradients), 7 where 5 must.
What is kept, and moved besides, are float32 numbers a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from structfly.lowering.launch import Launch, on_device
from structfly.lowering.linear_recurrence.arguments import DIFFERENTIABLE, STEPS_KEPT, Arguments, Gradients, Outputs
from structfly.lowering.linear_recurrence.chunks import Chunks
from structfly.lowering.template import load, render


class Shape(NamedTuple):
    """How the kernels are cut.

    Attributes:
        steps: of a chunk.
        group: steps that are loaded together; it divides ``steps``.
        block: channels of a program.
        warps: of a program.
    """

    steps: int = STEPS_KEPT["triton"]
    group: int = 8
    block: int = 128
    warps: int = 4


SHAPE = Shape()
# What the kernels read, in the order of their signatures.
_INPUTS = ("gate", "input", "input_gate", "reset")
_ADJOINT_INPUTS = ("gate", "output_gate", "upstream", "reset")


def forward(call: Arguments, shape: Shape = SHAPE) -> Outputs:
    """Fulfils the op's contract; ``shape.steps`` says how often a state is kept."""
    output = torch.empty_like(call.input)
    with on_device(call.input.device):
        level = Level(call, _chunks(call, shape), shape)
        states = level.states(adjoint=False)
        level.replay(states, output)
        final = level.leaving(states, adjoint=False)
    return Outputs(output, final, states if call.keep else states.new_empty(0, states.shape[1]))


def backward(
    call: Arguments,
    kept: Tensor,
    grad_output: Tensor | None,
    grad_final: Tensor | None,
    wanted: Sequence[bool],
    shape: Shape = SHAPE,
) -> Gradients:
    """The gradients that are ``wanted``; derivation in :mod:`structfly.lowering.linear_recurrence.op`."""
    made = Gradients._make(
        torch.empty_like(each) if want and each is not None else None
        for each, want in zip(call.differentiable, wanted, strict=True)
    )
    chunks = _chunks(call, shape)
    with on_device(call.input.device):
        level = Level(call, chunks, shape, upstream=grad_output, ending=grad_final, made=made)
        adjoints = level.states(adjoint=True)
        level.differentiate(kept, adjoints)
        if made.initial is not None:
            made.initial.copy_(level.leaving(adjoints, adjoint=True))
    return made


def _chunks(call: Arguments, shape: Shape) -> Chunks:
    batch, length, _ = call.input.shape
    offsets = None if call.offsets is None else call.offsets.to(torch.int64)
    return Chunks(shape.steps, batch, length, length, offsets)


class Level:
    """One recurrence over chunks: launches of its kernels."""

    def __init__(
        self,
        call: Arguments,
        chunks: Chunks,
        shape: Shape,
        *,
        upstream: Tensor | None = None,
        ending: Tensor | None = None,
        made: Gradients | None = None,
    ) -> None:
        self.call, self.chunks, self.shape = call, chunks, shape
        self.width = call.input.shape[2]
        self.bounds = None if chunks.offsets is None else chunks.bounds()
        self.table = None if self.bounds is None else chunks.table(self.bounds)
        self.given = {
            "gate": call.gate,
            "input": call.input,
            "input_gate": call.input_gate,
            "output_gate": call.output_gate,
            "upstream": upstream,
            "reset": None if call.reset is None else call.reset.view(torch.uint8).unsqueeze(2),
        }
        self.initial, self.ending = call.initial, ending
        self.made = {f"grad_{name}": each for name, each in zip(DIFFERENTIABLE[:-1], made or (), strict=False)}
        self.gradients = tuple(name for name, each in self.made.items() if each is not None)
        possible = {**self.given, "initial": self.initial, "ending": ending}
        written = {"output": call.input, **self.made}
        interpreted = not call.input.is_cuda
        rounded = [name for name, each in written.items() if each is not None and each.dtype == torch.bfloat16]
        self.kernels = kernels(
            shape=shape,
            given=tuple(name for name, each in possible.items() if each is not None),
            gradients=self.gradients,
            adjoint=made is not None,
            packed=self.table is not None,
            complement=call.complement,
            sigmoid=call.sigmoid,
            tanh=call.tanh,
            reverse=call.reverse,
            rounded=tuple(rounded) if interpreted else (),
        )

    # ------------------------------------------------------------------------------------------------------ launches

    def states(self, *, adjoint: bool) -> Tensor:
        """The states that leave the chunks, (chunks, D), or the e that leave them the other way."""
        product, local = (self.call.input.new_empty(self.chunks.count, self.width, dtype=torch.float32) for _ in "al")
        cut = torch.empty(self.chunks.count, dtype=torch.uint8, device=product.device)
        names = _ADJOINT_INPUTS if adjoint else _INPUTS
        kernel = self.kernels.summarize_adjoint if adjoint else self.kernels.summarize
        self._launch(kernel, *self._inputs(names), product, local, cut)
        broken = None if self.call.reset is None else cut.view(torch.bool)
        entering = self.ending if adjoint else self.initial
        if not self.chunks.count:
            return local
        if self.chunks.longest <= self.shape.steps:
            return self._of_one_chunk(product, local, entering, broken)
        return self._of_chunks(product, local, entering, broken, reverse=self.call.reverse != adjoint)

    def leaving(self, states: Tensor, *, adjoint: bool) -> Tensor:
        """Those that leave the sequences: of their last chunks, or what enters where there is none."""
        reverse, sequences = self.call.reverse != adjoint, self.call.sequences
        entering = self.ending if adjoint else self.initial
        given = states.new_zeros(sequences, self.width) if entering is None else entering.to(torch.float32, copy=True)
        if not self.chunks.count:
            return given
        if self.bounds is None:
            return states.view(sequences, -1, self.width)[:, 0 if reverse else -1].clone()
        last = self.bounds[:-1] if reverse else self.bounds[1:] - 1
        return torch.where((self.bounds.diff() > 0).unsqueeze(1), states[last.clamp(0, len(states) - 1)], given)

    def replay(self, states: Tensor, output: Tensor) -> None:
        """Write h, of the states that leave the chunks."""
        inputs = self._inputs((*_INPUTS, "output_gate"))
        self._launch(self.kernels.replay, *inputs, *_given(output), states, *_given(self.initial))

    def differentiate(self, states: Tensor, adjoints: Tensor) -> None:
        """Write the gradients, of the states and the e that leave the chunks."""
        inputs = self._inputs(tuple(self.given))
        made = [argument for name in self.gradients for argument in _given(self.made[name])]
        ends = *_given(self.initial), adjoints, *_given(self.ending)
        self._launch(self.kernels.differentiate, *inputs, *made, states, *ends)

    def _launch(self, kernel: Any, *arguments: Any) -> None:
        if not (self.chunks.count and self.width):
            return
        grid = self.chunks.count, -(-self.width // self.shape.block)
        table = () if self.table is None else (self.table,)
        chunks = self.chunks.count if self.table is not None else self.chunks.per_sequence
        sizes = (*table, chunks, self.chunks.length, self.width)
        launch = Launch(kernel, grid, {"BLOCK": self.shape.block}, num_warps=self.shape.warps)
        launch(*arguments, *sizes)

    def _inputs(self, names: Sequence[str]) -> list[Any]:
        return [argument for name in names for argument in _given(self.given[name])]

    # ---------------------------------------------------------------------------------------------- between the chunks

    def _of_one_chunk(self, product: Tensor, local: Tensor, entering: Tensor | None, broken: Tensor | None) -> Tensor:
        """States that leave chunks each of which is a sequence."""
        if entering is None:
            return local
        state = entering.to(torch.float32)
        state = state if self.table is None else state[self.table[0]]
        state = state if broken is None else state.masked_fill(broken.unsqueeze(1), 0.0)
        return torch.addcmul(local, product, state)

    def _of_chunks(
        self, product: Tensor, local: Tensor, entering: Tensor | None, broken: Tensor | None, *, reverse: bool
    ) -> Tensor:
        """The recurrence over the chunks, a level above."""
        above = self.chunks.above(self.shape.steps, self.bounds)
        cube = (above.batch, above.length, self.width)
        call = Arguments(
            gate=product.view(cube),
            input=local.view(cube),
            input_gate=None,
            output_gate=None,
            initial=entering,
            reset=None if broken is None else broken.view(cube[:2]),
            offsets=self.bounds,
            complement=False,
            sigmoid=False,
            tanh=False,
            reverse=reverse,
            keep=False,
        )
        level = Level(call, above, self.shape)
        # Where a sequence has one chunk no state is read, for none passes from chunk to chunk.
        states = local if above.longest <= self.shape.steps else level.states(adjoint=False)
        output = torch.empty_like(call.input)
        level.replay(states, output)
        return output.view(-1, self.width)


def _given(tensor: Tensor | None) -> tuple[Any, ...]:
    """A tensor that is there, with its strides."""
    return () if tensor is None else (tensor, *tensor.stride())


@lru_cache(maxsize=256)
def kernels(*, shape: Shape, sigmoid: bool, **parameters: Any) -> ModuleType:
    """The kernels of calls that have these arguments and ask for these gradients."""
    shut = 'float("-inf")' if sigmoid else "0.0"
    filled = (
        ("gate", 'float("inf")' if sigmoid else "1.0"),
        ("input", "0.0"),
        ("input_gate", shut),
        ("output_gate", shut),
        ("upstream", "0.0"),
    )
    cut = {"steps": shape.steps, "group": shape.group}
    return load(render("linear_recurrence", filled=filled, sigmoid=sigmoid, **cut, **parameters))

"""The recurrence as generated Triton kernels: one pass over time, in parallel, with the same bits every time.

A program loads a chunk of time, of some channels, into registers and keeps it there:

1. A row of the chunk is a few steps that a thread goes through one after another, for a channel or two.  It makes
   ``a s + b`` of the state s that enters it.  The rows' a and b are scanned: the chunk makes ``a s + b`` too.
2. The chunk's a and b are published.  The state that enters it is made of the a and b of those before it in its group
   of chunks, and of the state that leaves the group before; the group's last chunk publishes that of its own.
3. The rows are gone through again, from the states that enter them, and written.

So forward reads f and b once and writes h once, 3 numbers a step and channel, which is what must move.  Backward is the
same recurrence the other way, of e in :mod:`structfly.lowering.linear_recurrence.op`: it reads f, g and, where the
states are the output, those, and writes two gradients: 5.  Where they are not, because of an output gate, the chunk's
states are made again from the one that entered it, which forward keeps.

A wait is for programs that have started before, for a program takes its place in the order when it starts: none can
wait for ever, however the device schedules.  A chunk's a and b, or a group's state, are one word of 64 bits, of which
one value means that there is nothing yet: a word that is seen is seen whole, so no fences are needed, and what a hop
from group to group takes is one store, one load and one multiplication.  What is combined with what is fixed by the
chunks' numbers (unlike in Merrill and Garland 2016, where it depends on how far those before have come).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from structfly.lowering.launch import Launch, on_device
from structfly.lowering.linear_recurrence.arguments import Arguments, Gradients, Outputs
from structfly.lowering.linear_recurrence.chunks import Chunks
from structfly.lowering.linear_recurrence.shapes import Shape, backward_shape, forward_shape
from structfly.lowering.template import Parameter, load, render


def forward(call: Arguments, shape: Shape | None = None) -> Outputs:
    """Fulfils the op's contract; with an output gate, ``shape.chunk`` says how often a state is kept."""
    run = Run(call, shape or forward_shape(call), against=call.reverse)
    keep = call.keep and call.output_gate is not None
    output, final = torch.empty_like(call.input), run.ends(call.initial)
    kept = final.new_empty(run.chunks.count if keep else 0, run.width)
    run.launch(
        Kernel("linear_recurrence", "run", (("keep", keep), ("compensated", call.input.dtype == torch.float32))),
        {
            "gate": call.gate,
            "input": call.input,
            "input_gate": call.input_gate,
            "output_gate": call.output_gate,
            "reset": run.reset,
            "output": output,
            "final": final,
            "kept": kept if keep else None,
            "initial": call.initial,
        },
    )
    return Outputs(output, final, kept)


def backward(
    call: Arguments,
    states: Tensor,
    grad_output: Tensor | None,
    grad_final: Tensor | None,
    made: Gradients,
    shape: Shape | None = None,
) -> None:
    """Write the gradients where ``made`` says; derivation in :mod:`structfly.lowering.linear_recurrence.op`.

    ``states`` are the output where there is no output gate; else those that were kept, of which the others are made.
    """
    wants = {name for name, each in made._asdict().items() if each is not None}
    if not wants:
        return
    source = None
    if "gate" in wants or "output_gate" in wants:
        source = "output" if call.output_gate is None else "kept"
    again = source == "kept"
    weighted = again or wants & {"input", "input_gate"}
    changed = (
        again or (call.complement and "gate" in wants) or (call.tanh and "input" in wants) or "input_gate" in wants
    )
    run = Run(call, shape or backward_shape(call), against=not call.reverse)
    leaving = run.ends(grad_final) if "initial" in wants else None
    run.launch(
        Kernel("linear_recurrence_adjoint", "differentiate", (("states", source),)),
        {
            "gate": call.gate,
            "output_gate": call.output_gate,
            "upstream": grad_output,
            "input": call.input if changed else None,
            "input_gate": call.input_gate if weighted else None,
            "reset": run.reset,
            "output": states if source == "output" else None,
            "grad_gate": made.gate,
            "grad_input": made.input,
            "grad_input_gate": made.input_gate,
            "grad_output_gate": made.output_gate,
            "grad_initial": leaving,
            "kept": states if source == "kept" else None,
            "ending": grad_final,
            "initial": call.initial if source == "output" else None,
        },
    )
    if made.initial is not None and leaving is not None:
        made.initial.copy_(leaving)


class Run:
    """A launch over the chunks of a call, in the order of time or ``against`` it."""

    def __init__(self, call: Arguments, shape: Shape, *, against: bool) -> None:
        self.call, self.shape, self.against = call, shape, against
        batch, length, self.width = call.input.shape
        self.offsets = None if call.offsets is None else call.offsets.to(torch.int64)
        self.reset = None if call.reset is None else call.reset.view(torch.uint8)
        self.chunks = Chunks(shape.chunk, batch, length, self.offsets)

    def ends(self, given: Tensor | None) -> Tensor:
        """Where the states go that leave the sequences; those without steps have the ones that enter them."""
        sizes = (self.call.sequences, self.width)
        if self.offsets is None and self.chunks.count:
            return self.call.input.new_empty(sizes, dtype=torch.float32)
        zeros = self.call.input.new_zeros(sizes, dtype=torch.float32)
        return zeros if given is None else zeros.copy_(given)

    def launch(self, kernel: Kernel, tensors: Mapping[str, Tensor | None]) -> None:
        """Launch a kernel on the tensors that are there, in its signature's order."""
        call, chunks, device = self.call, self.chunks, self.call.input.device
        if not (chunks.count and self.width):
            return
        there = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        layouts = tuple([(name, each.dtype, each.stride(), each.data_ptr() % 16) for name, each in there.items()])
        linked, packed = chunks.length > self.shape.chunk, self.offsets is not None
        sizes = Sizes(chunks.count if packed else chunks.per_sequence, chunks.batch, chunks.length, self.width)
        options = (call.complement, call.sigmoid, call.tanh, call.reverse)
        with on_device(device):
            launch = _launch_of(kernel, self.shape, layouts, sizes, options, packed, linked, chunks.count, device)
            links = (no_links(call.input, chunks.count, self.width, self.shape.group),) if linked else ()
            table = (chunks.table(),) if packed else ()
            launch(*there.values(), *links, *table)


def no_links(like: Tensor, chunks: int, width: int, group: int) -> Tensor:
    """How many programs have started, the groups' states and the chunks' words: nothing as yet, which is -1.

    Args:
        like: on the device that it is for.
        chunks: all.
        width: channels.
        group: chunks of a group.
    """
    line = 16  # words of a cache line
    return like.new_full((line + (-(-chunks // group) + chunks) * width,), -1, dtype=torch.int64)


class Kernel(NamedTuple):
    """A template's kernel, and the template's own parameters."""

    template: str
    name: str
    parameters: tuple[tuple[str, Parameter], ...]


class Sizes(NamedTuple):
    """What a kernel is told: of ``chunks`` in a sequence of ``length`` steps, or in all where sequences are packed."""

    chunks: int
    batch: int
    length: int
    width: int


_READ = ("gate", "input", "input_gate", "output_gate", "upstream", "reset", "initial", "ending")
_OWN = ("final", "kept", "grad_initial")
"""Tensors of which a kernel knows the strides."""


@lru_cache(maxsize=512)
def _launch_of(
    kernel: Kernel,
    shape: Shape,
    layouts: tuple[tuple[str, torch.dtype, tuple[int, ...], int], ...],
    sizes: Sizes,
    options: tuple[bool, bool, bool, bool],
    packed: bool,
    linked: bool,
    chunks: int,
    device: torch.device,
) -> Launch:
    """A launch for tensors of such layouts, found once for all steps of a training: the host has little time for it.

    Args:
        layouts: name, dtype, strides, and how many bytes after a multiple of 16 it begins, of each tensor.
        options: complement, sigmoid, tanh, reverse.
        chunks: all.
    """
    names = [name for name, *_ in layouts]
    shape = shape.fitted(sizes.width)
    complement, sigmoid, tanh, reverse = options
    written = [(name, dtype) for name, dtype, *_ in layouts if name == "output" or "grad_" in name]
    module = kernels(
        kernel.template,
        given=tuple(name for name in _READ if name in names),
        gradients=tuple(name for name in names if "grad_" in name),
        packed=packed,
        linked=linked,
        ragged=packed or bool(sizes.length % shape.chunk or sizes.width % shape.block),
        prefetch=shape.prefetch,
        complement=complement,
        sigmoid=sigmoid,
        tanh=tanh,
        reverse=reverse,
        rounded=() if device.type == "cuda" else tuple(name for name, dtype in written if dtype == torch.bfloat16),
        interpreted=device.type != "cuda",
        **dict(kernel.parameters),
    )
    strides = [stride for name, _, each, _ in layouts if name not in _OWN for stride in each]
    constants = {"STEPS": shape.steps, "ROWS": shape.rows, "BLOCK": shape.block, "GROUP": shape.group}
    limit: dict[str, int] = {} if shape.registers is None else {"maxnreg": shape.registers}
    grid = (chunks * -(-sizes.width // shape.block),)
    function = getattr(module, kernel.name)
    return Launch(function, grid, constants, (*strides, *sizes), (), num_warps=shape.warps, **limit)


@lru_cache(maxsize=256)
def kernels(template: str, *, sigmoid: bool, **parameters: Parameter) -> ModuleType:
    """The kernels of calls that have these arguments and ask for these gradients."""
    shut = 'float("-inf")' if sigmoid else "0.0"
    filled = (
        ("gate", 'float("inf")' if sigmoid else "1.0"),
        ("input", "0.0"),
        ("input_gate", shut),
        ("output_gate", shut),
        ("upstream", "0.0"),
    )
    return load(render(template, filled=filled, sigmoid=sigmoid, **parameters))

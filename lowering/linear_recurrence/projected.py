"""A recurrence whose gates and inputs a product makes where they are used: they are not written.

A program makes the products of a chunk of time and of some channels, one for each gate, scans the chunk as
:mod:`structfly.lowering.linear_recurrence.recurrence_triton` does, and takes its entering state as there.  What moves
are the operands and h: of the three numbers a step and channel that f, z and o take nothing is written and read.

The products are made with channels as rows and time as columns, for then tensor cores leave a thread what it goes
through: of a product's columns a thread has, in each 8, the same 2.  So columns are put in the order in which column
8 k + r is step k of row r, by the descriptor that they are read with, and a thread has all steps of two rows.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from structfly.errors import ArgumentError
from structfly.lowering.descriptor import descriptor, operand
from structfly.lowering.launch import Launch, on_device
from structfly.lowering.linear_recurrence.recurrence_triton import no_links
from structfly.lowering.template import load, render


class Cut(NamedTuple):
    """How the kernel is cut; sizes are powers of 2.

    Attributes:
        steps: of a row.
        rows: of a chunk; with 8, or a multiple, no step is exchanged between threads.
        block: channels of a program, 16 at least; with 64 for every 4 warps, no step is exchanged between warps either.
        inner: the products' step along K, 16 at least.
        warps: of a program.
        stages: of the products' operands, which are loaded ahead.
        group: chunks of which one passes a state on.
    """

    steps: int = 16
    rows: int = 8
    block: int = 64
    inner: int = 64
    warps: int = 4
    stages: int = 2
    group: int = 8

    @property
    def chunk(self) -> int:
        """Steps of a chunk."""
        return self.steps * self.rows


CUTS = {"zf": Cut(stages=3), "zfo": Cut()}
"""By order.  A thread holds block * chunk / (32 warps) = 64 sums of each letter, and of a GPU's registers it has 255 at
most: so "zfoi" is none of these."""


def letters_of(order: str) -> str:
    """Its letters as :data:`CUTS` has them: in which order a weight makes them is all the same."""
    return "".join(sorted(order, key="zfoi".index))


def fastest_cut(order: str, dtype: torch.dtype) -> Cut:
    """That of letters in :data:`CUTS`, in any order; 128 bytes of an operand's row are loaded at a time."""
    return CUTS[letters_of(order)]._replace(inner=128 // dtype.itemsize)


def projected_recurrence(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    order: str,
    initial: Tensor | None,
    output: Tensor,
    *,
    reverse: bool,
    cut: Cut,
) -> Tensor:
    """``c_t = f_t c_{t-1} + w_t z_t``, ``h_t = o_t c_t``; z = tanh, f, o, w = sigmoid of ``inputs weight^T + bias``.

    Args:
        inputs: (B, T, K) of any strides, rows that overlap included; T is a multiple of ``cut.steps``.
        weight: (letters D, K) contiguous, in the dtype of ``inputs``: bfloat16, float16, or float32, of which products
            are made in TF32.
        bias: (letters D,), or None.
        order: what D rows of the weight each make: "z", "f", and of "o" and "i" those that there are.  Without "o" o
            is 1, and without "i" w is 1 - f.
        initial: (B, D) the states before the first steps, or None for zeros.
        output: (B, T, D) of any strides, in the dtype of ``inputs``; h is written there.
        reverse: the last step comes first.
        cut: how the kernel is cut.

    Returns:
        The states after the last steps, (B, D) float32.

    Raises:
        ArgumentError: T is no multiple of ``cut.steps``.
        UnsupportedError: channels of an operand or of the output are not contiguous, or something of them does not
            begin at a multiple of 16 bytes.
    """
    batch, length, inner = inputs.shape
    if length % cut.steps:
        raise ArgumentError(f"inputs have {length} steps; allowed: multiples of {cut.steps}, the steps of a row")
    width, rows = output.shape[2], length // cut.steps
    chunks = -(-rows // cut.rows)
    final = inputs.new_empty(batch, width, dtype=torch.float32)
    if not (batch and length):
        return final.zero_() if initial is None else final.copy_(initial)
    gates = weight.view(len(order), width, inner)
    operands = (
        operand(_in_rows(inputs, cut.steps), 1, cut.steps, cut.rows, cut.inner),
        operand(gates, 1, cut.block, cut.inner),
        descriptor(_in_rows(output, cut.steps), 1, cut.steps, cut.rows, cut.block),
    )
    tensors = [final]
    tensors = tensors if bias is None else [bias.contiguous(), *tensors]
    tensors = tensors if initial is None else [*tensors, initial]
    linked = chunks > 1
    module = kernels(
        order=order,
        bias=bias is not None,
        begun=initial is not None,
        reverse=reverse,
        linked=linked,
        dtype=str(inputs.dtype).removeprefix("torch."),
        interpreted=not inputs.is_cuda,
    )
    constants = {"STEPS": cut.steps, "ROWS": cut.rows, "BLOCK": cut.block, "GROUP": cut.group, "INNER": cut.inner}
    strides = () if initial is None else initial.stride()
    sizes = (*strides, chunks, batch, rows, width, inner)
    grid = (batch * chunks * -(-width // cut.block),)
    launch = Launch(module.run, grid, constants, sizes, (), num_warps=cut.warps, num_stages=cut.stages)
    with on_device(inputs.device):
        links = (no_links(inputs, batch * chunks, width, cut.group),) if linked else ()
        launch(*operands, *tensors, *links)
    return final


def _in_rows(steps: Tensor, count: int) -> Tensor:
    """(B, count, rows, width) of (B, T, width): a row is ``count`` steps, and step k of row r is [:, k, r]."""
    rows: Tensor = steps.unflatten(1, (-1, count))
    return rows.transpose(1, 2)


@lru_cache(maxsize=64)
def kernels(
    *, order: str, bias: bool, begun: bool, reverse: bool, linked: bool, dtype: str, interpreted: bool
) -> ModuleType:
    """The kernel of calls that have these arguments.

    Args:
        begun: whether sequences begin with states.
        linked: whether any chunk has one before it.
        dtype: of inputs and output, as torch and Triton name it.
    """
    return load(
        render(
            "projected_recurrence",
            order=order,
            bias=bias,
            begun=begun,
            reverse=reverse,
            linked=linked,
            dtype=dtype,
            interpreted=interpreted,
        )
    )

"""Recurrences of a linear map of windows over time: by the kernel that makes the map where it is used, but for a few
steps, or by a product and a recurrence."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from structfly.lowering.block_products.support import padded, why_no_products
from structfly.lowering.descriptor import has_descriptor
from structfly.lowering.linear_recurrence import kernels
from structfly.lowering.linear_recurrence.arguments import ProjectedArguments
from structfly.lowering.linear_recurrence.projected import CUTS, Cut, fastest_cut, letters_of, projected_recurrence
from structfly.lowering.precision import tf32_allowed


def why_in_two(weight: Tensor, order: str, window: int, steps: int, *, tf32: bool) -> str:
    """Why the map and the recurrence are two kernels, or "".

    Args:
        weight: of the map, as in :class:`~structfly.lowering.linear_recurrence.arguments.ProjectedArguments`, or an
            example of it.
        order: what it makes.
        window: steps that it takes.
        steps: of a sequence, those apart whose windows reach beyond the inputs.
        tf32: whether products of float32 may round their operands to TF32.
    """
    letters = letters_of(order)
    if letters not in CUTS:
        return f"measured faster in one are {', '.join(CUTS)}, and {letters} is not"
    if steps < CUTS[letters].chunk:
        return f"{steps} steps are less than the {CUTS[letters].chunk} of one program"
    out, inner = weight.shape
    why = why_no_products(weight, (inner // window, out // len(order)), tf32)
    return f"no product is generated of the operands: {why}" if why else ""


def forward(call: ProjectedArguments) -> tuple[Tensor, Tensor]:
    """h (B, T, D) and the last states (B, D), as ``structfly::projected_linear_recurrence_v1`` returns them."""
    if why_in_two(call.weight, call.order, call.window, call.steps, tf32=tf32_allowed()):
        return in_two(call)
    return in_one(call, fastest_cut(call.order, call.weight.dtype))


def in_two(call: ProjectedArguments) -> tuple[Tensor, Tensor]:
    """By a product, which is written, and the recurrence."""
    rows = _windows(call.inputs.contiguous(), call.window)
    made = kernels.forward(call.joint(functional.linear(rows, call.weight, call.bias), call.initial).separate)
    output = call.empty_output(call.inputs.shape[0], call.steps)
    return made.output if made.output.stride() == output.stride() else output.copy_(made.output), made.final


def in_one(call: ProjectedArguments, cut: Cut) -> tuple[Tensor, Tensor]:
    """By the kernel; arguments that it does not take as they lie are copied."""
    inputs = call.inputs
    in_turn = call.window == 1 or inputs.stride(1) == inputs.shape[2]
    if not (in_turn and all(inputs.stride()) and has_descriptor(inputs)):
        inputs = inputs.clone(memory_format=torch.contiguous_format)
    initial = None if call.initial is None else call.initial.to(call.state_dtype)
    call = call._replace(weight=padded(call.weight, call.weight.shape[1]), initial=initial)
    rows = _windows(inputs, call.window)
    first = call.steps % cut.steps
    if call.reverse:
        return first_apart(rows[:, call.steps - first :], rows[:, : call.steps - first], call, cut)
    return first_apart(rows[:, :first], rows[:, first:], call, cut)


def first_apart(first: Tensor, rest: Tensor, call: ProjectedArguments, cut: Cut) -> tuple[Tensor, Tensor]:
    """The first steps by a product and a recurrence, and the rest, from their states on, by the kernel.

    Args:
        first: (B, steps, window I) what the map takes at the first steps, which with ``call.reverse`` are the last in
            time.
        rest: (B, steps, window I) at the others, as many as are whole rows of the kernel; they may overlap.
        call: the other arguments.
        cut: how the kernel is cut.
    """
    batch, count, _ = first.shape
    output = call.empty_output(batch, count + rest.shape[1])
    start, remaining = output[:, :count], output[:, count:]
    if call.reverse:
        remaining, start = output[:, : rest.shape[1]], output[:, rest.shape[1] :]
    initial = call.initial
    if count:
        made = kernels.forward(call.joint(functional.linear(first, call.weight, call.bias), initial).separate)
        start.copy_(made.output)
        initial = made.final
    final = projected_recurrence(
        rest, call.weight, call.bias, call.order, initial, remaining, reverse=call.reverse, cut=cut
    )
    return output, final


def _windows(inputs: Tensor, window: int) -> Tensor:
    """(B, T, window I) of inputs whose steps lie one after another if there is a window, as a view of overlapping
    rows."""
    if window == 1:
        return inputs
    batch, length, width = inputs.shape
    return inputs.as_strided((batch, length - window + 1, window * width), (inputs.stride(0), width, 1))

"""Recurrences of a linear map of windows over time: by the kernel that makes the map where it is used, but for a few
steps, or by a product and a recurrence."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from structfly.lowering.block_products.support import padded, why_no_products
from structfly.lowering.descriptor import has_descriptor
from structfly.lowering.linear_recurrence import kernels
from structfly.lowering.linear_recurrence.arguments import Outputs, ProjectedArguments
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
    if why_in_two(call.weight, call.order, call.window, call.steps - call.apart, tf32=tf32_allowed()):
        return in_two(call)
    return in_one(call, fastest_cut(call.order, call.weight.dtype))


def in_two(call: ProjectedArguments) -> tuple[Tensor, Tensor]:
    """By a product, which is written, and the recurrence."""
    made = _of_product(call, _windows(_joined(call, call.inputs), call.window))
    output = call.empty_output()
    return made.output if made.output.stride() == output.stride() else output.copy_(made.output), made.final


def in_one(call: ProjectedArguments, cut: Cut) -> tuple[Tensor, Tensor]:
    """By the kernel, but for the first steps: those whose windows see what lies beside the inputs, and as many more as
    leave whole rows of the kernel's steps.  Arguments that it does not take as they lie are copied."""
    inputs, steps = call.inputs, call.steps
    in_turn = call.window == 1 or inputs.stride(1) == inputs.shape[2]
    if not (in_turn and all(inputs.stride()) and has_descriptor(inputs)):
        inputs = inputs.clone(memory_format=torch.contiguous_format)
    initial = None if call.initial is None else call.initial.to(call.state_dtype)
    call = call._replace(weight=padded(call.weight, call.weight.shape[1]), initial=initial)
    more = (steps - call.apart) % cut.steps
    first, seen = call.apart + more, more + call.window - 1  # the first steps, and what they see of the inputs
    output = call.empty_output()
    near, rest, start, remaining = inputs[:, :seen], inputs[:, more:], output[:, :first], output[:, first:]
    if call.reverse:
        near, rest = inputs[:, max(inputs.shape[1] - seen, 0) :], inputs[:, : inputs.shape[1] - more]
        start, remaining = output[:, steps - first :], output[:, : steps - first]
    if first:
        made = _of_product(call, _windows(_joined(call, near), call.window))
        start.copy_(made.output)
        initial = made.final
    rows = _windows(rest, call.window)
    final = projected_recurrence(
        rows, call.weight, call.bias, call.order, initial, remaining, reverse=call.reverse, cut=cut
    )
    return output, final


def _of_product(call: ProjectedArguments, rows: Tensor) -> Outputs:
    """What the map's product with windows, and the recurrence from the first states on, make."""
    return kernels.forward(call.joint(functional.linear(rows, call.weight, call.bias), call.initial).separate)


def _joined(call: ProjectedArguments, inputs: Tensor) -> Tensor:
    """Such steps and those beside them, one after another in memory."""
    if call.beside is None or not call.apart:
        return inputs.contiguous()
    return torch.cat([inputs, call.beside] if call.reverse else [call.beside, inputs], 1)


def _windows(inputs: Tensor, window: int) -> Tensor:
    """(B, T, window I) of inputs whose steps lie one after another if there is a window, as a view of overlapping
    rows; T is 0 where there are fewer steps than a window has."""
    if window == 1:
        return inputs
    batch, length, width = inputs.shape
    return inputs.as_strided((batch, max(length - window + 1, 0), window * width), (inputs.stride(0), width, 1))

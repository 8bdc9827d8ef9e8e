"""A QRNN layer's projection and pooling in one kernel, without gradients: what pooling takes is not written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from structfly.errors import UnsupportedError
from structfly.lowering.descriptor import ALIGNED
from structfly.lowering.linear_recurrence.projected import CUTS, Cut, projected_recurrence
from structfly.nn.window_product import why_not_taken
from structfly.nn.windows import windows
from structfly.ops.joint_recurrence import joint_linear_recurrence
from structfly.ops.recurrence import is_learned


def why_in_two(projection: nn.Module, input: Tensor, beside: Tensor, order: str, cell: Tensor | None) -> str:
    """Why a layer's projection and pooling are two kernels, or ""; arguments as of :func:`window_recurrence`."""
    if is_learned(input, beside, cell, *projection.parameters()):
        return "a gradient is asked for, and its backward takes what the projection makes"
    if order not in CUTS:
        return f"made in one are {', '.join(CUTS)}"
    if input.shape[1] < beside.shape[1] + CUTS[order].chunk:
        return f"{input.shape[1]} steps are less than the {CUTS[order].chunk} of one program"
    if cell is not None and (cell.dtype, cell.device) != (torch.float32, input.device):
        return "the states are not float32 on the input's device"
    why = why_not_taken(projection, input, beside)
    if why:
        return why
    weight: Any = projection.weight
    units = len(weight) // len(order)
    return f"{units} units are no multiple of {ALIGNED} bytes" if units * weight.element_size() % ALIGNED else ""


def window_recurrence(
    input: Tensor,
    beside: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    order: str,
    cell: Tensor | None,
    *,
    reverse: bool,
    cut: Cut,
) -> tuple[Tensor, Tensor]:
    """The pooling of a linear map of windows, as :class:`~structfly.nn.QRNN` has it.

    The kernel takes windows from the input, where every ``window`` steps make a row that begins one step after the row
    before it.  The first steps are left to torch: those whose windows see what lies beside the input, and as many more
    as leave whole rows of the kernel's steps.

    Args:
        input: (B, T, I) contiguous.
        beside: (B, window - 1, I), as in :func:`~structfly.nn.windows.windows`.
        weight: (letters H, window I) contiguous, in the dtype of the input: bfloat16, float16, or float32, of which
            products are made in TF32.
        bias: (letters H,), or None.
        order: "zf", "zfo" or "zfoi", what H rows of the weight each make.
        cell: (B, H) the states before the first steps, None for zeros.
        reverse: the last step comes first, and windows are on their steps' other side.
        cut: how the kernel is cut.

    Returns:
        h (B, T, H) in the dtype of the input, and the states after the last steps, (B, H) float32.

    Raises:
        UnsupportedError: a gradient is asked for, or I or H are no multiples of 16 bytes.
    """
    if is_learned(input, beside, weight, bias, cell):
        raise UnsupportedError(
            "a gradient is asked for of window_recurrence, which keeps nothing for a backward; call it under "
            "torch.no_grad(), or QRNN, which has a gradient"
        )
    batch, length, width = input.shape
    reach = beside.shape[1]
    edge = min(length, reach + (length - reach) % cut.steps)
    first, rest = slice(0, edge), slice(edge, None)
    if reverse:
        first, rest = slice(length - edge, None), slice(0, length - edge)
    output = input.new_empty(batch, length, weight.shape[0] // len(order))
    if edge:
        projected = functional.linear(windows(input[:, first], beside, reverse=reverse), weight, bias)
        output[:, first], cell = joint_linear_recurrence(
            projected,
            order,
            complement="i" not in order,
            gate_activation="sigmoid",
            input_activation="tanh",
            initial_state=cell,
            reverse=reverse,
        )
    seen = input if reverse else input[:, edge - reach :]
    rows = seen.as_strided((batch, length - edge, weight.shape[1]), (length * width, width, 1))
    final = projected_recurrence(rows, weight, bias, order, cell, output[:, rest], reverse=reverse, cut=cut)
    return output, final

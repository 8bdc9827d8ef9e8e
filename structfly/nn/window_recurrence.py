"""When a QRNN layer's projection and pooling are one kernel: without gradients, what pooling takes is not written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from structfly.lowering.linear_recurrence import projected_steps
from structfly.lowering.precision import tf32_allowed
from structfly.nn.window_product import why_not_taken
from structfly.ops.recurrence import is_learned


def why_in_two(projection: nn.Module, input: Tensor, beside: Tensor, order: str, cell: Tensor | None) -> str:
    """Why a layer's projection and pooling are two kernels, or "".

    Args:
        projection: of windows.
        input: (B, T, I).
        beside: (B, window - 1, I), as in :func:`~structfly.nn.windows.windows`.
        order: "zf", "zfo" or "zfoi", what H rows of the projection each make.
        cell: (B, H) the states before the first steps, None for zeros.
    """
    if is_learned(input, beside, cell, *projection.parameters()):
        return "a gradient is asked for, and its backward takes what the projection makes"
    if cell is not None and (cell.dtype, cell.device) != (torch.float32, input.device):
        return "the states are not float32 on the input's device"
    if why := why_not_taken(projection, input, beside):
        return why
    weight: Any = projection.weight
    reach = beside.shape[1]
    return projected_steps.why_in_two(weight, order, reach + 1, input.shape[1] - reach, tf32=tf32_allowed())

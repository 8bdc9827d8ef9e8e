"""Gradients of a linear map of windows over time, without the windows or their gradient.

With the steps beside the input and the input in the order of time, E, the window of step t has E_{t+k} at its place k.
So with the upstream gradient g and the weight's part W_k of a place

    dE_{t+k} += g_t W_k,    dW_k = sum_t g_t^T E_{t+k}:

a product a place, of steps that lie one after another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from structfly.lowering.gemm import float32_product


def of_steps(upstream: Tensor, weight: Tensor, reach: int, *, reverse: bool) -> tuple[Tensor, Tensor]:
    """Those of the input and of the steps beside it.

    Args:
        upstream: (B, T, out).
        weight: (out, (reach + 1) I).
        reach: steps beside the input.
        reverse: whether those come after it.

    Returns:
        (B, T, I) and (B, reach, I), parts of one tensor.
    """
    batch, length, _ = upstream.shape
    width = weight.shape[1] // (reach + 1)
    steps = upstream.new_empty(batch, reach + length, width)
    own = 0 if reverse else reach  # the place of a window's own step, whose product writes all but a few steps
    (steps[:, length:] if reverse else steps[:, :reach]).zero_()
    for place in sorted(range(reach + 1), key=lambda place: place != own):
        part = weight[:, place * width : (place + 1) * width].expand(batch, -1, -1)
        into = steps[:, place : place + length]
        torch.baddbmm(into, upstream, part, beta=float(place != own), out=into)
    return (steps[:, :length], steps[:, length:]) if reverse else (steps[:, reach:], steps[:, :reach])


def of_weight(upstream: Tensor, input: Tensor, beside: Tensor, *, reverse: bool) -> Tensor:
    """That of the weight, (out, (reach + 1) I), summed in float32 and rounded once.

    Args:
        upstream: (B, T, out) contiguous.
        input: (B, T, I) contiguous.
        beside: (B, reach, I).
        reverse: whether that comes after the input.
    """
    _, length, width = input.shape
    reach, out = beside.shape[1], upstream.shape[2]
    made = upstream.new_empty(out, (reach + 1) * width, dtype=torch.float32)
    for place in range(reach + 1):
        shift = place if reverse else reach - place
        part = made[:, place * width : (place + 1) * width]
        rows, seen = upstream.view(-1, out), input.view(-1, width)
        count = len(rows) - shift
        rows, seen = (rows[:count], seen[shift:]) if reverse else (rows[shift:], seen[:count])
        part.copy_(float32_product(rows.t(), seen))
        if shift:
            # A few steps see those beside the input instead, and none of the sequence that lies next to theirs.
            edge = slice(length - shift, None) if reverse else slice(0, shift)
            right = (beside[:, :shift] if reverse else beside[:, place:]).to(torch.float32, copy=True)
            if reverse:
                right[:-1] -= input[1:, :shift]
            else:
                right[1:] -= input[:-1, length - shift :]
            part.addmm_(upstream[:, edge].float().flatten(0, 1).t(), right.flatten(0, 1))
    return made.to(upstream.dtype)

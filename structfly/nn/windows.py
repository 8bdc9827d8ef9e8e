"""What a convolution over time sees at each step, side by side."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from structfly.ops.recurrence import is_learned


def windows(input: Tensor, beside: Tensor, *, reverse: bool) -> Tensor:
    """The steps that windows end with, or with ``reverse`` begin with, the earliest first.

    Written at once: a concatenation of the steps beside the input with it, and of what each place of a window sees,
    would move the input twice more.  Compilers are shown the concatenation where no gradient is asked for: on GPUs
    Inductor copies windows from what is concatenated, and structfly's rule finds them by it.

    Args:
        input: (B, T, I).
        beside: (B, window - 1, I), the steps before the input, or with ``reverse`` after it, in the order of time.
        reverse: which of the two.

    Returns:
        (B, T, window I); the input itself where the window is 1.
    """
    if not beside.shape[1]:
        return input
    if torch.compiler.is_compiling() and not is_learned(input, beside) and input.shape[1]:
        seen = torch.cat([input, beside] if reverse else [beside, input], 1)
        return seen.unfold(1, beside.shape[1] + 1, 1).transpose(2, 3).flatten(2)
    made: Tensor = _Windows.apply(input, beside, reverse)  # type: ignore[no-untyped-call]
    return made


class _Windows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, beside: Tensor, reverse: bool) -> Tensor:
        batch, length, width = input.shape
        reach = beside.shape[1]
        ctx.reach, ctx.reverse = reach, reverse
        out = input.new_empty(batch, length, reach + 1, width)
        edge = min(reach, length)  # windows that see steps beside the input
        near = input[:, length - edge :] if reverse else input[:, :edge]
        seen = torch.cat([near, beside] if reverse else [beside, near], 1)
        at_edge, inside = (slice(length - edge, length), slice(0, length - edge))
        if not reverse:
            at_edge, inside = slice(0, edge), slice(edge, length)
        for rows, source in ((at_edge, seen), (inside, input)):
            if rows.start < rows.stop:
                _copy(out[:, rows], source)
        return out.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        reach, reverse = ctx.reach, ctx.reverse
        upstream = upstream.unflatten(2, (reach + 1, -1))
        batch, length, _, width = upstream.shape
        own = 0 if reverse else reach
        of_input = upstream[:, :, own].clone()
        of_beside = upstream.new_zeros(batch, reach, width)
        for place in range(reach + 1):
            shift = abs(place - own)  # steps between the window's own and this one
            of_place = upstream[:, :, place]
            if shift and reverse:
                of_input[:, shift:] += of_place[:, : max(length - shift, 0)]
                of_beside[:, max(shift - length, 0) : shift] += of_place[:, max(length - shift, 0) :]
            elif shift:
                of_input[:, : max(length - shift, 0)] += of_place[:, shift:]
                first = reach - shift
                of_beside[:, first : first + min(shift, length)] += of_place[:, :shift]
        return of_input, of_beside, None


def _copy(target: Tensor, source: Tensor) -> None:
    """Windows (B, rows, window, I) of what lies in ``source`` (B, rows + window - 1, I)."""
    if source.is_cuda and not torch.compiler.is_compiling():  # eagerly, words of 8 bytes are copied faster than less
        per_word = 8 // source.element_size()
        sizes = (source.storage_offset(), target.storage_offset(), *source.stride()[:2], source.shape[2])
        if source.stride(2) == 1 and not any(size % per_word for size in sizes):
            target, source = target.view(torch.int64), source.view(torch.int64)
    target.copy_(source.unfold(1, target.shape[2], 1).transpose(2, 3))

"""A linear map of windows over time that are not written: the rows of the product's operand overlap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from structfly.compat import sees_operations
from structfly.lowering.block_products.listing import Listing
from structfly.lowering.block_products.support import padded, why_no_products
from structfly.lowering.block_products.tiles import sum_cut
from structfly.lowering.descriptor import ALIGNED
from structfly.lowering.precision import tf32_allowed
from structfly.nn import window_gradients
from structfly.nn.windows import windows


def projected(projection: nn.Module, input: Tensor, beside: Tensor, *, reverse: bool) -> Tensor:
    """``projection(windows(input, beside, reverse=reverse))``.

    Eagerly, on GPUs in bfloat16 and float16, and in float32 where TF32 is allowed, the product is generated and takes
    its windows from the input.  The backward does not write them either.
    """
    if why_written(projection, input, beside):
        made: Tensor = projection(windows(input, beside, reverse=reverse))
        return made
    product: Tensor = _Product.apply(input, beside, projection.weight, projection.bias, reverse)  # type: ignore[no-untyped-call]
    return product


def why_written(projection: nn.Module, input: Tensor, beside: Tensor) -> str:
    """Why windows are written, or ""."""
    if not beside.shape[1]:
        return "a window of one step is the step"
    if why := why_not_taken(projection, input, beside):
        return why
    weight: Any = projection.weight
    return why_no_products(weight, (input.shape[2], weight.shape[0]), tf32_allowed())


def why_not_taken(projection: nn.Module, input: Tensor, beside: Tensor) -> str:
    """Why no product takes windows from the input, whatever it is made by, or ""."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(input.device.type) or sees_operations():
        return "compilers, transforms, modes and autocast take the layer's own operations"
    if type(projection) is not nn.Linear or any(getattr(projection, hooks) for hooks in _HOOKS):
        return "the projection is no plain linear layer without hooks"
    if not (input.is_contiguous() and input.shape[1] > beside.shape[1]):
        return "the input is not contiguous, or not longer than a window"
    weight = projection.weight
    if input.data_ptr() % ALIGNED or weight.data_ptr() % ALIGNED:
        return f"the input or the weight does not begin at a multiple of {ALIGNED} bytes"
    if not (weight.is_contiguous() and weight.dtype == input.dtype == beside.dtype):
        return "the weight is not contiguous, or the dtypes differ"
    return ""


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, beside: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
        ctx.reverse = reverse
        ctx.save_for_backward(input, beside, weight)
        return window_product(input, beside, weight, bias, reverse=reverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        input, beside, weight = ctx.saved_tensors
        upstream = upstream.contiguous()
        of_input, of_beside, of_weight, of_bias = None, None, None, None
        if any(ctx.needs_input_grad[:2]):
            of_input, of_beside = window_gradients.of_steps(upstream, weight, beside.shape[1], reverse=ctx.reverse)
        if ctx.needs_input_grad[2]:
            of_weight = window_gradients.of_weight(upstream, input, beside, reverse=ctx.reverse)
        if ctx.needs_input_grad[3]:
            of_bias = upstream.sum((0, 1))
        return of_input, of_beside, of_weight, of_bias, None


def window_product(input: Tensor, beside: Tensor, weight: Tensor, bias: Tensor | None, *, reverse: bool) -> Tensor:
    """Windows times the weight's transpose, plus the bias.

    With all sequences one after another, every ``window`` steps make a row of the operand, which begins one step after
    the row before it.  Those that lie in two sequences are written over by what their steps see beside the input.

    Args:
        input: (B, T, I) contiguous, T longer than what windows reach.
        beside: (B, window - 1, I).
        weight: (out, window I) contiguous.
        bias: (out,), or None.
        reverse: as in :func:`~structfly.nn.windows.windows`.

    Returns:
        (B, T, out).

    Raises:
        UnsupportedError: rows do not begin at multiples of 16 bytes.
    """
    from structfly.lowering.block_products.products import block_sums  # not at the top: it imports triton

    batch, length, width = input.shape
    reach, out = beside.shape[1], weight.shape[0]
    count = batch * length - reach
    seen = input.as_strided((count, 1, weight.shape[1]), (width, width, 1))
    made = input.new_empty(batch, length, out)
    rows = made.view(batch * length, 1, out)[: count if reverse else None][0 if reverse else reach :]
    starts = torch.arange(2, dtype=torch.int32, device=input.device)
    listing = Listing(starts[:1], None, starts, 1)  # one part, of one product
    cut = sum_cut(weight, count, listing, out, weight.shape[1])
    block_sums(seen, weight[None], rows, listing, cut=cut, bias=None if bias is None else padded(bias[None], out))
    edge = slice(length - reach, None) if reverse else slice(0, reach)
    made[:, edge] = functional.linear(windows(input[:, edge], beside, reverse=reverse), weight, bias)
    return made

"""What the op refuses before it runs, and the schema cannot."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from structfly.compat import assert_on_device
from structfly.errors import StructflyError
from structfly.lowering.head.chunks import saved_dtype
from structfly.lowering.head.epilogue import parse_epilogue
from structfly.lowering.head.linear import DIFFERENTIABLE
from structfly.lowering.linear_cross_entropy.arguments import STATISTICS, Arguments
from structfly.lowering.linear_cross_entropy.row_program import parse_row_program
from structfly.lowering.linear_cross_entropy.schedule import why_no_blocks, why_no_exponentials


def check(call: Arguments) -> None:
    """Refuse unknown names, combinations with no meaning, and classes out of range as torch refuses them.

    Raises:
        StructflyError: what is wrong, what is allowed.
        IndexError: a target or choice on a CPU is no class; on a GPU the same is an assertion on the device.
    """
    if call.reduction not in ("none", "sum", "mean"):
        raise StructflyError(f"reduction is {call.reduction!r}; allowed: 'none', 'sum', 'mean'")
    if call.schedule not in ("forward", "backward"):
        raise StructflyError(f"schedule is {call.schedule!r}; allowed: 'forward', 'backward'")
    if call.scheme not in ("logits", "exponentials", "blocks"):
        raise StructflyError(f"scheme is {call.scheme!r}; allowed: 'logits', 'exponentials', 'blocks'")
    _check_statistics(call)
    _check_operands(call)
    unserved = "" if call.scheme == "logits" else _why_unserved(call)
    if unserved:
        raise StructflyError(f"the scheme {call.scheme!r} does not serve this head: {unserved}; use 'logits'")
    if call.schedule == "forward" and call.reduction == "none" and call.wanted.any:
        raise StructflyError("reduction='none' has no scalar upstream gradient; use schedule='backward'")
    if call.row_weight is not None and call.reduction != "sum":
        raise StructflyError(f"row_weight goes with reduction='sum', not {call.reduction!r}")
    for name, indices, ignored in (("target", call.target, call.ignore_index), ("choice", call.choices, None)):
        if indices is not None and not (indices.is_cuda and call.scheme != "logits"):
            _check_range(name, indices, call.num_classes, ignored)  # the other schemes look at every target anyway


def _check_range(name: str, indices: Tensor, classes: int, ignored: int | None) -> None:
    wrong = (indices < 0) | (indices >= classes)
    if ignored is not None:
        wrong &= indices != ignored
    if indices.is_cuda:
        assert_on_device(~wrong.any(), f"a {name} is out of bounds for {classes} classes")
    elif bool(wrong.any()):
        raise IndexError(f"{name.capitalize()} {int(indices[wrong][0])} is out of bounds.")


def _check_operands(call: Arguments) -> None:
    """Refuse operands that are not what the epilogue says, or gradients that are not one each."""
    epilogue, operands = parse_epilogue(call.epilogue), call.operands
    if len(operands) != len(epilogue.operands) or len(call.gradients) != len(DIFFERENTIABLE) + len(operands):
        raise StructflyError(
            f"{len(operands)} operands and {len(call.gradients)} flags of gradients; the epilogue {call.epilogue!r} "
            f"takes {len(epilogue.operands)} operands, which with {', '.join(DIFFERENTIABLE)} have a flag each"
        )
    if call.x.dtype == torch.float16 and call.wanted.any and not epilogue.has_steepest:
        raise StructflyError(
            f"the slope of epilogue {call.epilogue!r} has no bound, and float16 no room for it; use another dtype"
        )
    shapes = {"scalar": (), "row": (len(call.x),), "class": (call.num_classes,)}
    for operand, tensor in zip(epilogue.operands, operands, strict=True):
        condition = operand.index in epilogue.conditions
        fits = tensor.dtype == torch.bool if condition else tensor.is_floating_point()
        if tensor.shape != shapes[operand.kind] or not fits:
            raise StructflyError(
                f"operand {operand} of epilogue {call.epilogue!r} has shape {tuple(tensor.shape)} and {tensor.dtype}; "
                f"it takes {shapes[operand.kind]} and {'torch.bool' if condition else 'a floating-point dtype'}"
            )


def _check_statistics(call: Arguments) -> None:
    names = call.named_statistics
    if unknown := sorted(set(names) - set(STATISTICS)):
        raise StructflyError(f"statistics {unknown[0]!r} of {call.statistics!r} is not known; allowed: {STATISTICS}")
    if call.row_loss:
        _check_row_loss(call)
    elif call.row_operands or call.row_group:
        raise StructflyError("row_operands and row_group go with a row_loss")
    elif call.target is None and (call.reduction != "none" or "losses" in names or not names):
        raise StructflyError("without a target there is no loss; use reduction='none' and name other statistics")
    if call.reduction == "none" and "losses" in names:
        raise StructflyError("statistics 'losses' goes with a reduced loss; with reduction='none' the loss is that")
    if "chosen" in names and call.choices is None:
        raise StructflyError(f"statistics 'chosen' goes with choices; statistics is {call.statistics!r}")


def _check_row_loss(call: Arguments) -> None:
    program = parse_row_program(call.row_loss)
    if call.schedule != "forward" or call.reduction != "sum" or call.row_weight is not None:
        raise StructflyError("row_loss goes with schedule='forward', reduction='sum' and no row_weight")
    if saved_dtype(call.x.dtype) != call.x.dtype:
        raise StructflyError(f"row_loss of {call.x.dtype}, which has not the range for coefficients of any size")
    if program.operands != len(call.row_operands):
        raise StructflyError(f"row_loss reads {program.operands} operands, there are {len(call.row_operands)}")
    _check_group(call, program.dimensions)
    for name, given in (("loss", call.target), ("chosen", call.choices)):
        if name in program.statistics and given is None:
            raise StructflyError(f"row_loss reads {name!r}, for which the call has no indices")


def _check_group(call: Arguments, dimensions: int) -> None:
    rows, group = call.x.shape[0], tuple(call.row_group)
    size = math.prod(group)
    if len(group) < dimensions or min(group, default=1) < 1 or rows % size:
        raise StructflyError(
            f"row_group is {list(group)}; allowed are {dimensions} sizes or more, from 1 up, whose product divides the "
            f"{rows} rows"
        )
    for number, operand in enumerate(call.row_operands):
        shape = tuple(operand.shape)
        places = zip(shape[1:], group, strict=False)
        fits = len(shape) == 1 + len(group) and shape[0] == rows // size and all(n in (1, d) for n, d in places)
        if shape and not fits:
            raise StructflyError(
                f"row operand {number} has shape {shape}; allowed are () and {(rows // size, *group)}, where each size "
                "but the first may be 1"
            )


def _why_unserved(call: Arguments) -> str:
    """Why generated products do not serve the call, or ""."""
    epilogue = parse_epilogue(call.epilogue)
    reason = why_no_exponentials(
        call.x.dtype,
        call.x.shape[1],
        epilogue,
        label_smoothing=call.label_smoothing,
        adapter=call.adapter_x is not None,
        wanted=call.wanted,
        statistics=call.target is None or bool(call.statistics or call.row_loss),
    )
    return reason or (why_no_blocks(epilogue) if call.scheme == "blocks" else "")

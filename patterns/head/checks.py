"""What no head's op takes, as the node to blame and the reason."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from structfly.compat import wrapper_subclass
from structfly.lowering.head.linear import DEVICES, DTYPES, Wanted
from structfly.patterns.head.path import LogitsPath
from structfly.rewriter.region import example, example_of

# Progress of a miss beyond the walk itself: later conditions are further than any walk.
AFTER_TRACE = 10**6


def why_unsupported(paths: Sequence[LogitsPath]) -> tuple[fx.Node, str] | None:
    """Of the logits' device and dtype, and of operands that are no plain tensors."""
    node = paths[0].linear.node
    value = example_of(node)
    if value.device.type not in DEVICES:
        return node, f"on {value.device.type}; supported devices: {', '.join(DEVICES)}"
    if value.dtype not in DTYPES:
        return node, f"logits of {value.dtype}; supported: {', '.join(map(str, DTYPES))}"
    return _wrapper_operand(paths)


def why_too_steep(path: LogitsPath, gradients: Wanted) -> tuple[fx.Node, str] | None:
    """Of a chain whose slope the gradients' dtype may not hold."""
    half = example_of(path.linear.node).dtype == torch.float16
    if half and gradients.any and not path.chain.epilogue.has_steepest:
        reason = "the slope of the operations on float16 logits has no bound, and float16 no room for it"
        return path.linear.node, reason
    return None


def stranger(user: fx.Node) -> str:
    """Why a user of the logits, which is no part of the head, keeps them."""
    if user.op == "output":
        return (
            "the logits are returned as well, so they must exist; compile a function that returns the loss and not "
            "the logits (for a Hugging Face model: a step that returns model(...).loss)"
        )
    name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", str(user.target))
    return f"the logits are used elsewhere too, by {name} ({user.name}), so they must exist"


def _wrapper_operand(paths: Sequence[LogitsPath]) -> tuple[fx.Node, str] | None:
    """An operand that is no plain tensor: the op would run on what it wraps, without its meaning."""
    nodes = {node for path in paths for node in path.nodes}
    for operand in sorted({operand for node in nodes for operand in node.all_input_nodes}, key=str):
        value = example(operand)
        name = "" if value is None else wrapper_subclass(value)
        if name:
            return operand, f"{operand.name} is a {name}, for which the fused head has no rule; pass a plain tensor"
    return None

"""From a loss back to the linear beneath it."""

from __future__ import annotations

import torch
from torch import fx

from structfly.compat import expression
from structfly.patterns.head.chain import (
    POINTWISE,
    describe,
)
from structfly.patterns.head.path import LogitsPath, Obstacle, Reads
from structfly.patterns.head.trail import TrailReader
from structfly.rewriter.calls import read
from structfly.rewriter.linear import is_cast, read_linear, turned
from structfly.rewriter.region import Region, example
from structfly.rewriter.views import example_tuple, read_view, view_input


def trace(form: Reads, region: Region) -> LogitsPath | Obstacle:
    """Walk from a loss's input back to a linear-like producer, then read the way forwards.

    A loss may take the rows of the producer's value as its classes: where that is read, the producer is turned round.
    """
    trail: list[fx.Node] = []
    node = form.logits
    while True:
        linear = read_linear(node)
        if linear is not None:
            break
        source = _logits_operand(node)
        if isinstance(source, str):
            return Obstacle(node, source, len(trail))
        trail.append(node)
        if isinstance(example_tuple(node.args[0]), (tuple, list)):
            trail.append(node.args[0])  # type: ignore[arg-type]  # the split beneath an element
        node = source
    trail.reverse()
    path = TrailReader(linear, tuple(trail), form, region).read()
    other = turned(linear) if isinstance(path, Obstacle) else None
    if other is not None:
        around = TrailReader(other, tuple(trail), form, region).read()
        path = path if isinstance(around, Obstacle) else around
    return path


def _logits_operand(node: fx.Node) -> fx.Node | str:
    """The operand of ``node`` that carries the logits, or why there is none."""
    call = read(node)
    result = example(node)
    if node.op == "placeholder":
        return (
            f"the logits come into this graph as its input {node.name}, so no linear is in sight; if the compiled "
            "function makes them, a graph break lies between: see the report's graph breaks"
        )
    if call is None or result is None:
        return f"{describe(node)} stands where a linear, or something that may follow one, is expected"
    if call.op in ("add", "sub", "mul", "div", "where"):
        source = next((a for a in (call["input"], call["other"]) if _same_shape(a, result)), None)
    elif call.op in (*POINTWISE, "contiguous", "clone", "detach", "log_softmax") or is_cast(call):
        source = call["input"]
    elif read_view(node, 0) is not None:
        source = view_input(node)
    else:
        return f"{describe(node)} of the logits is not an operation the head's epilogue has"
    if not isinstance(source, fx.Node):
        return f"{describe(node)} has no operand shaped like logits"
    return source


def _same_shape(value: object, like: torch.Tensor) -> bool:
    tensor = example(value)
    return (
        tensor is not None
        and tensor.ndim == like.ndim
        and all(expression(a) == expression(b) for a, b in zip(tensor.shape, like.shape, strict=True))
    )

"""Windows over time, several steps side by side at each step: ``x.unfold(1, window, 1)``, turned and flattened."""

from __future__ import annotations

from typing import NamedTuple

from torch import fx

from structfly.compat import expression
from structfly.rewriter.calls import Call, flat, read
from structfly.rewriter.region import example
from structfly.rewriter.writes import written


class Windows(NamedTuple):
    """Windows that are written.

    Attributes:
        source: (B, T + window - 1, I) the steps.
        window: how many are side by side.
        nodes: what writes (B, T, window I), the last one first.
    """

    source: fx.Node
    window: int
    nodes: tuple[fx.Node, ...]


def read_windows(node: fx.Node) -> Windows | None:
    """The windows that a node is, the earliest step first, or None."""
    joined = _read(node, ("flatten", "reshape", "view"))
    turned = None if joined is None else _read(joined["input"], ("transpose", "permute", "getattr"))
    unfolded = None if turned is None or not _turns(turned) else _read(turned["input"], ("unfold",))
    if joined is None or turned is None or unfolded is None:
        return None
    window, source, made = unfolded["size"], example(unfolded["input"]), example(node)
    if source is None or made is None or source.ndim != 3 or made.ndim != 3 or not isinstance(window, int):
        return None
    sizes = [expression(size) for size in source.shape]
    expected = [sizes[0], sizes[1] - window + 1, window * sizes[2]]
    if [expression(size) for size in made.shape] != expected:  # along another dimension, or further apart
        return None
    return Windows(unfolded["input"], window, (node, turned.node, unfolded.node))


def _read(node: object, ops: tuple[str, ...]) -> Call | None:
    call = read(node)
    return None if call is None or call.op not in ops or written(call.node) else call


def _turns(call: Call) -> bool:
    """Whether a view swaps the last two of four dimensions and nothing else."""
    if call.op == "getattr":
        return bool(call["name"] == "mT")
    if call.op == "permute":
        return [dim % 4 for dim in flat(call["dims"])] == [0, 1, 3, 2]
    return {call["dim0"] % 4, call["dim1"] % 4} == {2, 3}

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
        source: (B, S, I) the steps.
        beside: (B, K, I) the steps before them, or after them where the recurrence goes back in time; None for zeros.
        apart: K.
        window: how many are side by side.
        nodes: what writes (B, S + K - window + 1, window I), the last one first.
    """

    source: fx.Node
    beside: fx.Node | None
    apart: int
    window: int
    nodes: tuple[fx.Node, ...]


def read_windows(node: fx.Node, *, reverse: bool) -> Windows | None:
    """The windows that a node is, the earliest step first, or None.

    Steps are read apart from those beside them where those are fewer than a window has, lie where the recurrence
    begins, and nothing else reads both.
    """
    joined = _read(node, ("flatten", "reshape", "view"))
    turned = None if joined is None else _read(joined["input"], ("transpose", "permute", "getattr"))
    unfolded = None if turned is None or not _turns(turned) else _read(turned["input"], ("unfold",))
    if joined is None or turned is None or unfolded is None:
        return None
    window, seen, made = unfolded["size"], unfolded["input"], example(node)
    source = example(seen)
    if source is None or made is None or source.ndim != 3 or made.ndim != 3 or not isinstance(window, int):
        return None
    sizes = [expression(size) for size in source.shape]
    expected = [sizes[0], sizes[1] - window + 1, window * sizes[2]]
    if [expression(size) for size in made.shape] != expected:  # along another dimension, or further apart
        return None
    nodes = (node, turned.node, unfolded.node)
    steps = _steps_apart(seen, reverse=reverse, most=window - 1) if len(seen.users) == 1 else None
    return Windows(seen, None, 0, window, nodes) if steps is None else Windows(*steps, window, (*nodes, seen))


def _steps_apart(node: fx.Node, *, reverse: bool, most: int) -> tuple[fx.Node, fx.Node | None, int] | None:
    """Steps, and ``most`` at most that lie beside them, of both in one tensor: see :class:`Windows`."""
    call = _read(node, ("cat", "pad"))
    if call is None:
        return None
    if call.op == "pad":
        amounts = [*flat(call["pad"]), 0, 0][:6]
        beside = amounts.pop(3 if reverse else 2) if len(amounts) == 6 else 0
        zeros = not call.get("value")  # other modes than a constant pad nothing but the last of three dimensions
        taken = zeros and not any(amounts) and isinstance(beside, int) and 0 < beside <= most
        return (call["input"], None, beside) if taken else None
    parts = list(call["tensors"])
    if len(parts) != 2 or call.get("dim", 0) not in (1, -2):
        return None
    source, steps = parts if reverse else parts[::-1]
    seen, beside = example(source), example(steps)
    if seen is None or beside is None or seen.ndim != 3 or seen.dtype != beside.dtype:
        return None
    count = beside.shape[1]
    return (source, steps, count) if isinstance(count, int) and count <= most else None


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

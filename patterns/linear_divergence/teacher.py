"""The teacher's side: a linear of its own where nothing else needs its logits, else the tensor that is there."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import fx

from structfly.compat import expression, wrapper_subclass
from structfly.patterns.head.logits import trace
from structfly.patterns.head.path import LogitsPath, Obstacle
from structfly.patterns.linear_divergence.reader import is_exact_cast
from structfly.patterns.linear_divergence.readings import Distribution, Divergence
from structfly.rewriter.calls import read
from structfly.rewriter.region import Region, example
from structfly.rewriter.writes import written


@dataclass(frozen=True)
class GivenTeacher:
    """A tensor of the student's logits' shape.

    Attributes:
        form: what it holds, as the op's ``teacher_form``.
        node: the tensor.
        epilogue: of logits, what is still to be done to them.
        nodes: the nodes that do it, which a rewrite makes superfluous.
    """

    form: str
    node: fx.Node
    epilogue: str = ""
    nodes: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Softmax:
    """A softmax as a reader of logits, for :func:`trace`."""

    anchor: fx.Node
    logits: fx.Node
    class_dim: int
    inner: tuple[fx.Node, ...] = ()
    of_log_softmax: bool = False


def softmax_of(distribution: Distribution, nodes: Collection[fx.Node], region: Region) -> Softmax:
    """The last of ``nodes`` that takes the softmax of the distribution's logits, with the others as inner nodes."""
    assert distribution.node is not None
    assert distribution.class_dim is not None
    users = [user for user in distribution.node.users if user in nodes]
    *others, last = sorted(users, key=region.order.__getitem__)
    return Softmax(last, distribution.node, distribution.class_dim, tuple(others))


def read_teacher(
    distribution: Distribution, divergence: Divergence, anchor: fx.Node, region: Region
) -> LogitsPath | GivenTeacher:
    """The teacher's linear, if the op can run it and only ``divergence`` sees its logits, else what is given."""
    assert distribution.node is not None
    if distribution.form != "logits":
        return GivenTeacher(distribution.form, distribution.node)
    path = trace(softmax_of(distribution, divergence.nodes, region), region)
    if not isinstance(path, Obstacle) and _fits(path) and not _seen_by_others(path, divergence, anchor, region):
        return path
    return _given_logits(distribution.node)


def _fits(path: LogitsPath) -> bool:
    operands = {operand for node in path.nodes for operand in node.all_input_nodes}
    plain = not any(wrapper_subclass(value) for value in map(example, operands) if value is not None)
    return plain and not path.chain.operands and path.linear.adapter is None


def _seen_by_others(path: LogitsPath, divergence: Divergence, anchor: fx.Node, region: Region) -> bool:
    """Whether the teacher's logits, or what is made of them on the way to ``anchor``, must exist all the same."""
    own = divergence.nodes | path.nodes
    dependent = set(path.nodes)
    for node in sorted(divergence.nodes, key=region.order.__getitem__):
        if not dependent.isdisjoint(node.all_input_nodes):
            dependent.add(node)
    return any(user not in own for node in dependent - {anchor} for user in node.users)


def _given_logits(node: fx.Node) -> GivenTeacher:
    """Logits beneath what the op does to them itself, so that no scaled or wider copy of them is made."""
    steps: list[str] = []
    nodes: list[fx.Node] = []
    while not written(node):
        call = read(node)
        if call is None:
            break
        if call.op in ("mul", "div") and isinstance(call["input"], fx.Node):
            by = call["other"]
            if isinstance(by, bool) or not isinstance(by, (int, float)) or call.get("rounding_mode") is not None:
                break
            if not math.isfinite(by) or by == 0:
                break
            steps.append(f"{call.op}:{float(by)!r}")
        elif not is_exact_cast(call) and call.op != "detach":
            break
        nodes.append(node)
        node = call["input"]
    return GivenTeacher("logits", node, ",".join(reversed(steps)), tuple(nodes))


def entry_bytes(teacher: LogitsPath | GivenTeacher, class_dim: int) -> int:
    """Bytes that an entry takes in a chunk: none for rows that are read where they lie."""
    if isinstance(teacher, GivenTeacher):
        value = example(teacher.node)
        assert value is not None
        if expression(value.stride(class_dim)) == 1:
            return 0
    return teacher_dtype(teacher).itemsize


def teacher_dtype(teacher: LogitsPath | GivenTeacher) -> torch.dtype:
    """Of its products, or of the tensor."""
    value = example(teacher.linear.node if isinstance(teacher, LogitsPath) else teacher.node)
    assert value is not None
    return value.dtype

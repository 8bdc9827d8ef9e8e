"""The way from a linear to a loss, or what stands in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import fx

from structfly.compat import expression
from structfly.patterns.head.chain import Chain
from structfly.rewriter.linear import LinearLike
from structfly.rewriter.region import example
from structfly.rewriter.views import RowView


@dataclass(frozen=True)
class LogitsPath:
    """The way from a linear to a loss.

    Attributes:
        linear: the producer.
        trail: nodes from just above the linear up to the loss's input, in graph order.
        views: how the rows move, in order.
        view_nodes: the trail node of each view.
        bias: the linear's own bias, or a class vector that is added to the value of one without, or None.
        chain: the pointwise operations.
        num_classes: the classes were cut to the first so many, or None.
        class_dim: the class dimension at the loss.
        nodes: all nodes that exist only to make these logits (writes into them included), or make nothing of them.
    """

    linear: LinearLike
    trail: tuple[fx.Node, ...]
    views: tuple[RowView, ...]
    view_nodes: tuple[fx.Node, ...]
    bias: fx.Node | None
    chain: Chain
    num_classes: int | None
    class_dim: int
    nodes: frozenset[fx.Node]

    @property
    def transform(self) -> tuple[object, ...]:
        """What happens to the values on the way: paths that agree make the same numbers of a row."""
        return self.chain, self.bias, self.num_classes

    @property
    def rows(self) -> tuple[object, ...]:
        """Which rows arrive, and in which order: paths that agree bring the same ones."""
        return tuple(
            (view.call.op, view.arguments, view.element, view.class_dim, _sizes(view.call["input"]))
            for view in self.views
            if not view.ordered
        )


def _sizes(node: fx.Node) -> tuple[object, ...]:
    value = example(node)
    return () if value is None else tuple(map(expression, value.shape))


@dataclass(frozen=True)
class Obstacle:
    """Why there is no path, where, and how many nodes back that was."""

    node: fx.Node
    reason: str
    progress: int


class Reads(Protocol):
    """What reads logits: a loss, or a softmax; ``inner`` are nodes between the logits and ``anchor``."""

    @property
    def anchor(self) -> fx.Node: ...
    @property
    def logits(self) -> fx.Node: ...
    @property
    def class_dim(self) -> int: ...
    @property
    def of_log_softmax(self) -> bool: ...
    @property
    def inner(self) -> tuple[fx.Node, ...]: ...


def foreign_users(paths: Sequence[LogitsPath], forms: Sequence[Reads]) -> list[fx.Node]:
    """Users of the logits that belong to none of the paths and losses."""
    anchors = frozenset(form.anchor for form in forms)
    own = anchors.union(*(path.nodes for path in paths), *(form.inner for form in forms))
    return [user for node in own - anchors for user in node.users if user not in own]

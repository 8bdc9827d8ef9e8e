"""A structured layer with its activation, as found."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from structfly.lowering.layer_op import LayerOp
from structfly.records import Site


@dataclass(frozen=True)
class EpilogueSite(Site):
    """A call of a layer's op, whose output an activation reads and nothing else; ``node`` is the activation.

    Attributes:
        call: the op's node.
        y: its first output.
        op: what it calls.
        activation: its name, as :data:`~structfly.lowering.activations.ACTIVATIONS` has it.
        read_bytes: of the output, read once and written once.
        stands_alone: whether the activation is a pass over memory of its own.
    """

    call: fx.Node
    y: fx.Node
    op: LayerOp
    activation: str
    read_bytes: int
    stands_alone: bool

    @property
    def dead_nodes(self) -> tuple[fx.Node, ...]:
        return (self.call, self.y, self.node)

    @property
    def groups(self) -> tuple[tuple[fx.Node, ...], ...]:
        return ((self.call,), (self.y, self.node))  # what is written stands where the call did

"""A scalar that statistics of rows end in, row by row or group by group: coefficient classes B and C.

Between the statistics and the scalar stand pointwise operations on values of single rows, then sums over rows, then
operations that are linear in these sums.  Such a scalar is sum_n l_n with l_n a function of row n alone: a sum is left
out, and what multiplies or divides a sum does so to every summand.  ``row_reader`` reads l_n as a program of
:mod:`~structfly.lowering.linear_cross_entropy.row_program`; its operands are what the user's code takes besides, in the
order of the rows.

Where something that is not linear is done to sums over some rows, or to different rows at once, l is a function of a
group of rows.  ``row_axes`` says which.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx

from structfly.patterns.linear_cross_entropy.loss import LossForm
from structfly.patterns.linear_cross_entropy.row_axes import Dims, RowAxes


@dataclass(frozen=True)
class GraphValue:
    """The value of ``node``, broadcast to the axes of the value that it meets; None for a scalar."""

    node: fx.Node
    dims: Dims | None


@dataclass(frozen=True)
class Count:
    """How many values these axes have."""

    dims: Dims


@dataclass(frozen=True)
class MeanDivisor:
    """What a mean loss divides by."""

    form: LossForm


@dataclass(frozen=True)
class LiveRows:
    """Which rows of a loss are not ignored."""

    form: LossForm


# What a program takes beside statistics.
Operand = GraphValue | Count | MeanDivisor | LiveRows


@dataclass(frozen=True)
class Term:
    """A value outside the program that is added to the scalar: ``node`` after multiplications and divisions."""

    node: fx.Node
    steps: tuple[tuple[str, fx.Node | float], ...] = ()

    def then(self, operation: str, operand: fx.Node | float) -> Term:
        return replace(self, steps=(*self.steps, (operation, operand)))


@dataclass(frozen=True)
class RowLoss:
    """A scalar that is a sum over rows, or over groups of rows.

    Attributes:
        root: the node whose value it is.
        program: l_n.
        axes: those of the rows; a group has some inside.
        operands: what the program takes, in order.
        terms: what is added to the sum.
        nodes: the nodes between the consumers and the root, the root included, in the order of the graph.
    """

    root: fx.Node
    program: str
    axes: RowAxes
    operands: tuple[Operand, ...]
    terms: tuple[Term, ...]
    nodes: tuple[fx.Node, ...]

    @property
    def coefficient_class(self) -> str:
        """B where every row is a group, C where groups have more."""
        return "C" if self.axes.inner else "B"

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """What has to exist where the op stands; terms are added at the root."""
        values = (operand.node for operand in self.operands if isinstance(operand, GraphValue))
        return (*self.axes.inputs, *values)


@dataclass(frozen=True)
class NoRowLoss:
    """Why there is no program: the coefficient class, and the reason."""

    coefficient_class: str
    reason: str

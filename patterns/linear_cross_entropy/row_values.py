"""What is known of a value of the user's graph that depends on statistics of rows, and why there may be no program."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import fx

from structfly.patterns.linear_cross_entropy.row_axes import (
    Axis,
    Dims,
    OfConsumer,
    OfReshape,
    Size,
    leaves,
    leaves_of,
    reshaped,
)
from structfly.patterns.linear_cross_entropy.row_loss import NoRowLoss, Term


class NoProgramError(Exception):
    """There is no program, because of something in the user's graph; ``why`` says what."""

    def __init__(self, coefficient_class: str, reason: str) -> None:
        super().__init__(reason)
        self.why = NoRowLoss(coefficient_class, reason)


@dataclass(frozen=True)
class RowValue:
    """A value that depends on statistics.

    Attributes:
        token: how the program calls it; for a sum, its summands.
        dims: its axes, for each of its dimensions.
        over: for a sum, the axes that it goes over, which its summands have besides.
        summed: it is a sum over rows.
        live: gradients come back through it.
        flag: it is a truth value.
        terms: what is added to a sum.
    """

    token: str
    dims: Dims
    over: tuple[Axis, ...] = ()
    summed: bool = False
    live: bool = True
    flag: bool = False
    terms: tuple[Term, ...] = ()

    @property
    def axes(self) -> frozenset[Axis]:
        """Those of the value, or of a sum's summands."""
        return frozenset((*leaves_of(self.dims), *leaves(self.over)))


def class_without(values: Iterable[RowValue]) -> str:
    """The coefficient class where nothing can be made of ``values``: C if sums over some rows are among them, else
    D."""
    return "C" if any(value.summed and value.dims for value in values) else "D"


def reshaped_rows(
    node: fx.Node, source: Dims, sizes: Sequence[Size], origin: Callable[[int], OfConsumer | OfReshape]
) -> Dims:
    """The axes of ``node``, which has ``sizes`` and the values of something with the axes ``source``.

    Raises:
        NoProgramError: they are not known.
    """
    dims = reshaped(source, sizes, origin)
    if dims is None:
        raise NoProgramError("D", f"{node.name} has another shape of the rows, in which their places are not known")
    return dims

"""The algebra of sums over rows: what may be done to a sum while the program still writes its summands.

What is linear in a sum is done to every summand: a factor multiplies them, a second sum over the same rows adds its
own.  What is added besides stays out of the program, as a term.  For anything else a sum over some rows is written
into the program as a value of its own, its terms with it, and what it goes over is then inside a group.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from structfly.patterns.linear_cross_entropy.class_values import shape_of
from structfly.patterns.linear_cross_entropy.program_writer import ProgramWriter
from structfly.patterns.linear_cross_entropy.row_axes import Axis, RowAxes, leaves, leaves_of
from structfly.patterns.linear_cross_entropy.row_loss import Count, Term
from structfly.patterns.linear_cross_entropy.row_values import NoProgramError, RowValue, class_without
from structfly.rewriter.calls import Call, flat
from structfly.rewriter.region import example_of


class RowSums:
    """Reads sums over rows; :class:`NoProgramError` where a rule does not cover one."""

    def __init__(self, rows: RowAxes, writer: ProgramWriter) -> None:
        self._rows, self._writer = rows, writer

    def over_all(self, value: RowValue) -> bool:
        """Whether it is a sum over all rows."""
        return value.summed and set(self._rows.given).issubset(leaves(value.over))

    def whole(self, value: RowValue, node: fx.Node) -> RowValue:
        """A sum over some rows as a value of its own, for ``node``, with what was added to it: what it goes over is
        inside a group."""
        token = self._summed(value.token, value.over)
        for term in value.terms:
            added = self._writer.argument(term.node, node, value.dims)
            for operation, operand in term.steps:
                added = self._writer.emit(operation, added, self._writer.argument(operand, node, value.dims))
            token = self._writer.emit("add", token, added)
        return replace(value, token=token, over=(), summed=False, terms=())

    def _summed(self, token: str, over: Iterable[Axis]) -> str:
        gone = leaves(over)
        for axis in self._rows.given:
            if axis in gone:
                axis.inner = True
                token = self._writer.emit("sum", token, axis)
        return token

    def of(self, call: Call, value: RowValue) -> RowValue:
        """The sum or mean ``call`` of ``value``."""
        source = example_of(call["input"])
        dims = flat(call["dim"]) if call.get("dim") is not None else tuple(range(source.ndim))
        if not all(isinstance(dim, int) for dim in dims):
            raise NoProgramError("D", f"{call.node.name} goes over dimensions that are not constants")
        dims = tuple(sorted(dim % max(source.ndim, 1) for dim in dims)) if source.ndim else ()
        token = self._writer.emit("number", value.token) if value.flag else value.token
        over = tuple(value.dims[dim] for dim in dims)
        keeps = bool(call.get("keepdim", False))
        left = tuple(() if dim in dims else axes for dim, axes in enumerate(value.dims) if keeps or dim not in dims)
        if call.op == "mean":
            sizes = [source.shape[dim] for dim in dims]
            if all(isinstance(size, int) for size in sizes):
                count = repr(float(math.prod(sizes)))
            else:
                count = self._writer.operand(Count(over))
            if value.terms:
                raise NoProgramError("D", f"{call.node.name} is a mean of a sum to which something was added")
            token = self._writer.emit("div", token, count)
        over_axes = (*value.over, *leaves_of(over))
        return RowValue(token, left, over_axes, summed=True, live=value.live, terms=value.terms)

    def linear(self, call: Call, operation: str, given: Sequence[Any], values: Sequence[RowValue | None]) -> RowValue:
        """What is linear in sums, done to their summands.

        Args:
            given: the operands of ``operation``.
            values: those of them that depend on statistics, one a sum at least; None in the place of others.
        """
        node = call.node
        sums = [value for value in values if value is not None]
        if not all(value.summed for value in sums):
            raise NoProgramError("D", f"{node.name} takes both values of single rows and a sum over rows")
        first = values[0]
        shape = shape_of(node)
        if operation == "neg" and first is not None:
            return self._negated(first)
        if operation in ("add", "sub") and len(sums) == 2:
            return self._added(call, operation, sums)
        if len(sums) == 1 and operation in ("add", "sub") and shape == ():
            return self._with_term(operation, given, values)
        value = sums[0]
        operand = next((each for each, v in zip(given, values, strict=True) if v is None), None)
        plain = operation == "mul" or (operation == "div" and first is not None)
        carrier = given[0] if first is not None else given[1] if len(given) > 1 else None
        if len(sums) != 1 or not plain or operand is None or shape_of(carrier) != shape:
            raise NoProgramError(class_without(sums), f"{node.name} is not linear in a sum over rows")
        token = self._writer.emit(operation, value.token, self._writer.argument(operand, node, value.dims))
        return replace(value, token=token, terms=_then(value.terms, operation, operand))

    def _negated(self, value: RowValue) -> RowValue:
        return replace(value, token=self._writer.emit("neg", value.token), terms=_then(value.terms, "mul", -1.0))

    def _added(self, call: Call, operation: str, sums: Sequence[RowValue]) -> RowValue:
        first, second = sums
        shapes = {shape_of(each) for each in (call.node, call["input"], call["other"])}
        one, other = first.axes, second.axes
        if shapes != {()} and (len(shapes) > 1 or leaves_of(first.dims) != leaves_of(second.dims) or one != other):
            raise NoProgramError("C", f"{call.node.name} adds sums over different rows")
        both = [axis for axis in self._rows.given if axis in one and axis in other]
        token = self._writer.emit(
            operation, *(self._summed(value.token, value.axes.difference(both)) for value in sums)
        )
        over = tuple(axis for axis in both if axis not in leaves_of(first.dims))
        terms = second.terms if operation == "add" else _then(second.terms, "mul", -1.0)
        return RowValue(token, first.dims, over, True, first.live or second.live, terms=(*first.terms, *terms))

    def _with_term(self, operation: str, given: Sequence[Any], values: Sequence[RowValue | None]) -> RowValue:
        """A sum, and something else added to it or subtracted, or it from that."""
        place = 0 if values[0] is not None else 1
        value, other = values[place], given[1 - place]
        assert value is not None
        if not isinstance(other, fx.Node):
            raise NoProgramError("D", "a number is added to a sum over rows")
        term = Term(other)
        if operation == "sub" and place == 0:
            term = term.then("mul", -1.0)
        elif operation == "sub":
            value = self._negated(value)
        return replace(value, terms=(*value.terms, term))


def _then(terms: Sequence[Term], operation: str, operand: fx.Node | float) -> tuple[Term, ...]:
    return tuple(term.then(operation, operand) for term in terms)

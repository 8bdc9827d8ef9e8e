"""Pointwise operations on values that depend on statistics of rows, as instructions of a row program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from structfly.compat import expression
from structfly.patterns.linear_cross_entropy.class_values import shape_of
from structfly.patterns.linear_cross_entropy.program_writer import ProgramWriter
from structfly.patterns.linear_cross_entropy.row_axes import Axis, Dims, RowAxes, Size, leaves, leaves_of
from structfly.patterns.linear_cross_entropy.row_sums import RowSums
from structfly.patterns.linear_cross_entropy.row_values import NoProgramError, RowValue, class_without
from structfly.rewriter.calls import Call
from structfly.rewriter.region import example_of

# Canonical call -> the program's operation, and the call's operands in its order.
_POINTWISE: dict[str, tuple[str, tuple[str, ...]]] = {
    **{name: (name, ("input", "other")) for name in ("add", "sub", "mul", "div", "pow")},
    **{name: (name, ("input", "other")) for name in ("gt", "ge", "lt", "le", "eq", "ne", "and", "or")},
    **{name: (name, ("input",)) for name in ("neg", "abs", "exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "square")},
    **{name: (name, ("input",)) for name in ("reciprocal", "tanh", "sigmoid", "logsigmoid", "relu", "detach", "not")},
    "minimum": ("min", ("input", "other")),
    "maximum": ("max", ("input", "other")),
    "softplus": ("softplus", ("input",)),
    "where": ("where", ("condition", "input", "other")),
    "masked_fill": ("where", ("mask", "value", "input")),
}


class RowPointwise:
    """Reads pointwise operations; :class:`NoProgramError` for any other.

    Args:
        known: what is known of the nodes before the one that is read.
    """

    def __init__(self, known: Mapping[fx.Node, RowValue], rows: RowAxes, sums: RowSums, writer: ProgramWriter) -> None:
        self._known, self._rows, self._sums, self._writer = known, rows, sums, writer

    def of(self, call: Call) -> RowValue:
        """The value of ``call``."""
        operation, names = self._operation(call)
        given = [call.get(name) for name in names]
        values = [self._known.get(each) if isinstance(each, fx.Node) else None for each in given]
        found = [value for value in values if value is not None]
        if any(value.summed for value in found):
            try:
                return self._sums.linear(call, operation, given, values)
            except NoProgramError:
                if any(map(self._sums.over_all, found)):
                    raise
            values = [
                self._sums.whole(value, call.node) if value is not None and value.summed else value for value in values
            ]
            found = [value for value in values if value is not None]
        if operation in ("and", "or", "not") and not all(value.flag for value in found):
            raise NoProgramError("D", f"{call.node.name} works on the bits of numbers")
        dims = self._met(call, found)
        defaults = ("0.0", "-inf", "inf")
        tokens = []
        for value, each, default in zip(values, given, defaults, strict=False):
            if value is not None:
                tokens.append(value.token)
            else:
                tokens.append(default if each is None else self._writer.argument(each, call.node, dims))
        flag = example_of(call.node).dtype == torch.bool
        live = any(value.live for value in found) and not flag and operation != "detach"
        return RowValue(self._writer.emit(operation, *tokens), dims, live=live, flag=flag)

    def _operation(self, call: Call) -> tuple[str, tuple[str, ...]]:
        """The program's operation, and the names of the call's operands in its order."""
        if call.op == "clamp" and not any(isinstance(call.get(bound), fx.Node) for bound in ("min", "max")):
            return "clamp", ("input", "min", "max")
        if call.op in ("min", "max") and isinstance(call.get("dim"), fx.Node):
            return call.op, ("input", "dim")
        if call.op in _POINTWISE:
            return _POINTWISE[call.op]
        inputs = [self._known[node] for node in call.node.all_input_nodes if node in self._known]
        raise NoProgramError(class_without(inputs), f"{call.node.name} is not an operation on values of single rows")

    def _met(self, call: Call, found: Sequence[RowValue]) -> Dims:
        """The axes of what values make together; operands may spread it over an axis that is inside the groups."""
        shape = shape_of(call.node) or ()
        sizes = example_of(call.node).shape
        dims: list[tuple[Axis, ...]] = []
        for place in range(-len(shape), 0):
            there = {leaves(value.dims[place]) for value in found if -place <= len(value.dims)} - {()}
            if len(there) > 1:
                raise NoProgramError("D", f"{call.node.name} takes rows in different places")
            dims.append(there.pop() if there else self._spread(call, sizes[place], found))
        every = leaves_of(tuple(dims))
        if len(set(every)) < len(every):
            raise NoProgramError("D", f"{call.node.name} spreads values of rows over others")
        return tuple(dims)

    def _spread(self, call: Call, size: Size, found: Sequence[RowValue]) -> tuple[Axis, ...]:
        """An axis of ``size`` along which no value changes yet."""
        if size == 1:
            return ()
        used = frozenset[Axis]().union(*(value.axes for value in found))
        free = [axis for axis in self._rows.inner if axis not in used and expression(axis.size) == expression(size)]
        if not free:
            raise NoProgramError("D", f"{call.node.name} spreads values of rows over others")
        return (free[0],)

"""Nodes of a graph as operations of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from structfly.patterns.linear_recurrence.expressions import Bounds, Expression, Number, Operation
from structfly.rewriter.calls import read

_ARITHMETIC = ("add", "sub", "mul", "div", "lerp", "addcmul", "where", "masked_fill")


def operation(node: fx.Node, of: Any) -> Operation:
    """A node as an operation on the expressions that ``of`` gives for its operands."""
    call = read(node)
    if call is None:
        return Operation(name_of(node), (("input", tuple(map(of, node.all_input_nodes))),), node)
    arithmetic = call.op in _ARITHMETIC

    def value(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return of(argument)
        if isinstance(argument, (tuple, list)):
            return tuple(map(value, argument))
        if isinstance(argument, slice):
            return Bounds(*map(value, (argument.start, argument.stop, argument.step)))
        if arithmetic and isinstance(argument, (int, float)) and not isinstance(argument, bool):
            return Number(argument)
        return argument

    return Operation(call.op, tuple((name, value(argument)) for name, argument in call.arguments.items()), node)


def name_of(node: fx.Node) -> str:
    """What a node calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def expressions(leaves: Mapping[fx.Node, Expression]) -> Callable[[fx.Node], Expression]:
    """The nodes of a graph as expressions of some of them."""
    made = dict(leaves)

    def of(node: fx.Node) -> Expression:
        if node not in made:
            made[node] = operation(node, of)
        return made[node]

    return of

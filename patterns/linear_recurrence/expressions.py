"""What a step computes, as an expression of its slices, of values that all steps share, and of the state before it.

Expressions are compared by what they compute, so that ``1 - f`` written twice is one thing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import fx


@dataclass(frozen=True)
class Number:
    """The same number in all steps."""

    value: float


@dataclass(frozen=True)
class Shared:
    """The same tensor in all steps."""

    node: fx.Node


@dataclass(frozen=True)
class Part:
    """The step's slice of sequence ``number``."""

    number: int


@dataclass(frozen=True)
class State:
    """The state that the step takes."""


@dataclass(frozen=True)
class Operation:
    """An operation on expressions.

    Attributes:
        op: its name in :mod:`structfly.rewriter.calls`.
        arguments: by name; expressions, or values of Python with tuples for lists and ``Bounds`` for slices.
        node: where it stands in the graph, for reports; None where it was derived.
    """

    op: str
    arguments: tuple[tuple[str, Any], ...]
    node: fx.Node | None = field(default=None, compare=False)

    def get(self, name: str, default: Any = None) -> Any:
        return next((value for key, value in self.arguments if key == name), default)

    def __getitem__(self, name: str) -> Any:
        return next(value for key, value in self.arguments if key == name)


Expression: TypeAlias = Number | Shared | Part | State | Operation
EXPRESSIONS = (Number, Shared, Part, State, Operation)


@dataclass(frozen=True)
class Bounds:
    """A slice, which Python cannot hash."""

    start: Any
    stop: Any
    step: Any


ZERO, ONE = Number(0.0), Number(1.0)


def operands(value: Any) -> Iterator[Expression]:
    """The expressions in an argument."""
    if isinstance(value, EXPRESSIONS):
        yield value
    elif isinstance(value, tuple):
        for each in value:
            yield from operands(each)


def inner(value: Expression) -> Iterator[Expression]:
    """The operands of an expression."""
    if isinstance(value, Operation):
        for _, argument in value.arguments:
            yield from operands(argument)


def mapped(value: Any, function: Callable[[Expression], Any]) -> Any:
    """An argument with ``function`` applied to the expressions in it."""
    if isinstance(value, EXPRESSIONS):
        return function(value)
    if isinstance(value, tuple):
        return tuple(mapped(each, function) for each in value)
    return value


def depends(value: Expression, on: Expression, known: dict[int, bool] | None = None) -> bool:
    """Whether ``on`` is in ``value``."""
    known = {} if known is None else known
    if id(value) not in known:
        known[id(value)] = value == on or any(depends(each, on, known) for each in inner(value))
    return known[id(value)]


def replaced(
    value: Expression, old: Expression, new: Expression, known: dict[int, Expression] | None = None
) -> Expression:
    """``value`` with ``new`` in the place of ``old``, simplified."""
    known = {} if known is None else known
    if value == old:
        return new
    if not isinstance(value, Operation):
        return value
    if id(value) not in known:
        arguments = {
            name: mapped(argument, lambda each: replaced(each, old, new, known)) for name, argument in value.arguments
        }
        known[id(value)] = _remade(value, arguments)
    return known[id(value)]


def _remade(value: Operation, arguments: dict[str, Any]) -> Expression:
    make = {"add": add, "sub": sub, "mul": mul}.get(value.op)
    if make is not None and set(arguments) == {"input", "other"}:
        return make(arguments["input"], arguments["other"], value.node)
    if value.op == "neg":
        return neg(arguments["input"], value.node)
    return Operation(value.op, tuple(arguments.items()), value.node)


def binary(op: str, one: Expression, other: Expression, node: fx.Node | None = None) -> Operation:
    return Operation(op, (("input", one), ("other", other)), node)


def add(one: Expression, other: Expression, node: fx.Node | None = None) -> Expression:
    if one == ZERO:
        return other
    if other == ZERO:
        return one
    if isinstance(one, Number) and isinstance(other, Number):
        return Number(one.value + other.value)
    return binary("add", one, other, node)


def sub(one: Expression, other: Expression, node: fx.Node | None = None) -> Expression:
    if other == ZERO:
        return one
    if one == ZERO:
        return neg(other, node)
    if isinstance(one, Number) and isinstance(other, Number):
        return Number(one.value - other.value)
    return binary("sub", one, other, node)


def mul(one: Expression, other: Expression, node: fx.Node | None = None) -> Expression:
    if ZERO in (one, other):
        return ZERO
    if one == ONE:
        return other
    if other == ONE:
        return one
    if isinstance(one, Number) and isinstance(other, Number):
        return Number(one.value * other.value)
    return binary("mul", one, other, node)


def neg(value: Expression, node: fx.Node | None = None) -> Expression:
    if isinstance(value, Number):
        return Number(-value.value)
    if isinstance(value, Operation) and value.op == "neg":
        inner: Expression = value["input"]
        return inner
    return Operation("neg", (("input", value),), node)

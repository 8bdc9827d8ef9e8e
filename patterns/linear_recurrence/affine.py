"""A step's state as an affine function of the state before it, ``c = a p + b``.

The rules follow each operation from its operands: with x = a p + b and y = a' p + b',

    x + y          (a + a') p + (b + b')
    u x            (u a) p + u b                      where u does not depend on p
    lerp(x, y, w)  x + w (y - x)
    where(m, x, y) where(m, a, a') p + where(m, b, b')

A step that puts something else in the place of the state for whole rows, ``where(m, u, a p + b)``, is a reset: it takes
0 for p, whatever p is, and adds u.  That is not a p with a = 0, which is nan where p is infinite.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import fx

from structfly.patterns.linear_recurrence.expressions import (
    ONE,
    ZERO,
    Expression,
    Number,
    Operation,
    State,
    add,
    binary,
    depends,
    mul,
    neg,
    sub,
)
from structfly.rewriter.region import example


class Affine(NamedTuple):
    """``gate * p + input``, with 0 for p where ``reset`` is true."""

    gate: Expression
    input: Expression
    reset: Expression | None = None


class Obstacle(NamedTuple):
    """The node that is no affine function of the state, and why."""

    node: fx.Node | None
    reason: str


_CASTS = ("to", "type_as", "float", "half", "bfloat16", "double")
_MIXING = ("linear", "matmul", "addmm", "einsum")


class _NotAffine(Exception):  # noqa: N818  it carries a result through the recursion
    def __init__(self, node: fx.Node | None, reason: str) -> None:
        super().__init__(reason)
        self.obstacle = Obstacle(node, reason)


def read_affine(step: Expression) -> Affine | Obstacle:
    """``step`` as an affine function of the state, or what of it is none."""
    try:
        return _Reader().read(step)
    except _NotAffine as found:
        return found.obstacle


class _Reader:
    """One reading; every expression is read once."""

    def __init__(self) -> None:
        self._read: dict[int, Affine] = {}
        self._depends: dict[int, bool] = {}

    def read(self, value: Expression) -> Affine:
        if id(value) not in self._read:
            self._read[id(value)] = self._of(value)
        return self._read[id(value)]

    def _of(self, value: Expression) -> Affine:
        if isinstance(value, State):
            return Affine(ONE, ZERO)
        if not isinstance(value, Operation) or not depends(value, State(), self._depends):
            return Affine(ZERO, value)
        op = value.op
        if op in ("add", "sub"):
            weight = value.get("alpha", ONE)
            return self._sum(value["input"], value["other"], weight, minus=op == "sub", node=value.node)
        if op == "neg":
            gate, input, reset = self.read(value["input"])
            return Affine(neg(gate), neg(input), reset)
        if op == "mul":
            return self._product(value["input"], value["other"], value.node)
        if op == "div" and value.get("rounding_mode") is None and not depends(value["other"], State(), self._depends):
            gate, input, reset = self.read(value["input"])
            return Affine(_quotient(gate, value["other"]), _quotient(input, value["other"]), reset)
        if op == "lerp":
            return self._lerp(value)
        if op == "addcmul":
            product = self._product(value["tensor1"], value["tensor2"], value.node)
            scaled = _scaled(value.get("value", ONE), product)
            return self._added(self.read(value["input"]), scaled, value.node)
        if op == "where":
            return self._chosen(value["condition"], value["input"], value["other"], value.node)
        if op == "masked_fill":
            return self._chosen(value["mask"], value["value"], value["input"], value.node)
        if op in ("zeros_like", "ones_like"):
            return Affine(ZERO, ZERO if op == "zeros_like" else ONE)
        if op in ("clone", "contiguous") or (op in _CASTS and _is_floating(value.node)):
            return self.read(value["input"])
        raise _NotAffine(value.node, _why(op))

    def _sum(
        self, one: Expression, other: Expression, weight: Expression, *, minus: bool, node: fx.Node | None
    ) -> Affine:
        factor = neg(weight) if minus else weight
        return self._added(self.read(one), _scaled(factor, self.read(other)), node)

    def _added(self, one: Affine, other: Affine, node: fx.Node | None) -> Affine:
        resets = {each.reset for each in (one, other) if each.gate != ZERO}
        if len(resets) > 1:
            raise _NotAffine(node, "the state is reset in one term of a sum and not, or elsewhere, in the other")
        return Affine(_sum(one.gate, other.gate), _sum(one.input, other.input), one.reset or other.reset)

    def _product(self, one: Expression, other: Expression, node: fx.Node | None) -> Affine:
        if depends(one, State(), self._depends) and depends(other, State(), self._depends):
            raise _NotAffine(node, "a product of the state with itself, which is not linear in it")
        factor, rest = (other, one) if depends(one, State(), self._depends) else (one, other)
        return _scaled(factor, self.read(rest))

    def _lerp(self, value: Operation) -> Affine:
        weight = value["weight"]
        if depends(weight, State(), self._depends):
            raise _NotAffine(value.node, "the weight of a lerp depends on the state, which is not linear in it")
        kept = _scaled(sub(ONE, weight), self.read(value["input"]))
        return self._added(kept, _scaled(weight, self.read(value["end"])), value.node)

    def _chosen(self, mask: Expression, one: Expression, other: Expression, node: fx.Node | None) -> Affine:
        if depends(mask, State(), self._depends):
            raise _NotAffine(node, "where a condition depends on the state, a step is not linear in it")
        first, second = self.read(one), self.read(other)
        input = _where(mask, first.input, second.input, node)
        if first.gate != ZERO and second.gate != ZERO:
            if first.reset != second.reset:
                raise _NotAffine(node, "the state is reset in one case of a choice and not, or elsewhere, in the other")
            return Affine(_where(mask, first.gate, second.gate, node), input, first.reset)
        kept = first if first.gate != ZERO else second
        where = mask if kept is second else Operation("not", (("input", mask),))
        return Affine(kept.gate, input, where if kept.reset is None else binary("or", kept.reset, where))


def _is_floating(node: fx.Node | None) -> bool:
    value = example(node)
    return value is not None and value.is_floating_point()


def _scaled(factor: Expression, value: Affine) -> Affine:
    return Affine(mul(factor, value.gate), mul(factor, value.input), value.reset)


def _quotient(value: Expression, divisor: Expression) -> Expression:
    return ZERO if value == ZERO else binary("div", value, divisor)


def _sum(one: Expression, other: Expression) -> Expression:
    """``one + other``, as a difference where the second is a negative, or was multiplied by one."""
    if isinstance(other, Operation) and other.op == "neg":
        return sub(one, other["input"])
    if isinstance(other, Operation) and other.op == "mul":
        first, second = other["input"], other["other"]
        if isinstance(first, Number) and first.value == -1:
            return sub(one, second)
        if isinstance(first, Operation) and first.op == "neg":
            return sub(one, mul(first["input"], second))
        if isinstance(second, Operation) and second.op == "neg":
            return sub(one, mul(first, second["input"]))
    return add(one, other)


def _where(mask: Expression, one: Expression, other: Expression, node: fx.Node | None) -> Expression:
    if one == other:
        return one
    return Operation("where", (("condition", mask), ("input", one), ("other", other)), node)


def _why(op: str) -> str:
    if op in _MIXING:
        return f"{op} of the state: a matrix mixes its channels, and structfly's recurrences have a gate for each"
    if op == "detach":
        return "the state is detached in every step, so that no gradient goes from step to step"
    return f"{op} of the state, which is not affine in it"

"""The pointwise operations an epilogue is made of, each in one line of mathematics.

An expression is text that Python evaluates on tensors and that kernels contain as it stands, so that an operation has
one definition for both.  In it

    u   the running value before the step          a, b   the step's operands
    y   the value after it                         g      the gradient with respect to y

and ``where``, ``tanh``, ``sigmoid`` and ``exp`` are known functions.  Values round as the user's program does, one
operation after another; gradients are those of torch's formulas, at the bounds of a clamp as well.  (A computer
algebra's derivatives are not: it puts terms in another order, evaluates tanh again where y is at hand, and has its own
opinion of a bound.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import CodeType
from typing import Any

import torch

_NAME = re.compile(r"\b[a-z]+\b")
_ON_TENSORS = {"abs": abs, "where": torch.where, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "exp": torch.exp}
_IN_KERNELS = {"where": "tl.where", "tanh": "_tanh", "sigmoid": "tl.sigmoid", "exp": "tl.exp"}


@dataclass(frozen=True)
class Operation:
    """One operation.

    Attributes:
        value: y.
        gradient: the gradient with respect to u.
        operands: the gradient with respect to each operand; None for a condition, which has none.
        steepest: the largest that |dy/du| can be, None if it has no bound.
    """

    value: str
    gradient: str
    operands: tuple[str | None, ...] = ()
    steepest: str | None = "1.0"

    @property
    def affine(self) -> bool:
        """True if dy/du does not depend on u, and is a factor."""
        return names(self.gradient) <= {"g", "a"}


OPERATIONS: Mapping[str, Operation] = {
    "add": Operation("u + a", "g", ("g",)),
    "sub": Operation("u - a", "g", ("-g",)),
    "rsub": Operation("a - u", "-g", ("g",)),
    "mul": Operation("u * a", "g * a", ("g * u",), "abs(a)"),
    "div": Operation("u / a", "g / a", ("-g * y / a",), "1.0 / abs(a)"),
    "rdiv": Operation("a / u", "-g * y / u", ("g / u",), None),
    "neg": Operation("-u", "-g"),
    "exp": Operation("exp(u)", "g * y", (), None),
    "tanh": Operation("tanh(u)", "g * (1.0 - y * y)"),
    "sigmoid": Operation("sigmoid(u)", "g * (1.0 - y) * y"),
    "clamp_min": Operation("where(u < a, a, u)", "where(u < a, 0.0, g)", ("where(u < a, g, 0.0)",)),
    "clamp_max": Operation("where(u > a, a, u)", "where(u > a, 0.0, g)", ("where(u > a, g, 0.0)",)),
    "where": Operation("where(a, u, b)", "where(a, g, 0.0)", (None, "where(a, 0.0, g)")),
    "masked_fill": Operation("where(a, b, u)", "where(a, 0.0, g)", (None, "where(a, g, 0.0)")),
}


@cache
def names(expression: str) -> frozenset[str]:
    """The names in an expression, functions among them."""
    return frozenset(_NAME.findall(expression))


def evaluate(expression: str, **values: Any) -> Any:
    """The expression's value on tensors and numbers."""
    return eval(_compiled(expression), _ON_TENSORS.copy(), values)


@cache
def _compiled(expression: str) -> CodeType:
    return compile(expression, "<operation>", "eval")


def in_kernel(expression: str, **values: str) -> str:
    """The expression as a kernel's source, every name replaced by the source of its value."""
    return _NAME.sub(lambda name: {**_IN_KERNELS, **values}[name[0]], expression)

"""A loss of single rows, written by the user, as a program over their statistics.

With l_n = program(statistics of row n, operands of row n) and L = sum_n l_n, the coefficients of the row's statistics
are dl_n / dloss_n, dl_n / dlse_n and so on: functions of that row alone, known as soon as its chunk's statistics are.
So the gradients are made in the same pass (coefficient class B), whatever the program is.

The program is a string, an argument of the op: instructions joined by ``;``, each an operation and its arguments joined
by spaces.  Arguments are statistics (``loss``, ``lse``, ``entropy``, ``argmax``, ``chosen0``, ``chosen1``, ...),
operands ``r0``, ``r1``, ..., results of earlier instructions ``%0``, ``%1``, ..., and numbers.  The last result is l_n.
For instance, the clipped ratio of PPO with the old log-probability r0 and the advantage r1 (``loss`` is minus the
log-probability):

    neg loss;sub %0 r0;exp %1;mul %2 r1;clamp %2 0.8 1.2;mul %4 r1;min %3 %5;neg %6
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from structfly.compat import recording_gradients
from structfly.errors import StructflyError
from structfly.lowering.linear_cross_entropy.rows import Coefficients, RowStatistics

# name -> (number of arguments, function); derivatives are autograd's, as in eager.
OPERATIONS: dict[str, tuple[int, Callable[..., Any]]] = {
    "add": (2, operator.add),
    "sub": (2, operator.sub),
    "mul": (2, operator.mul),
    "div": (2, operator.truediv),
    "pow": (2, operator.pow),
    "min": (2, torch.minimum),
    "max": (2, torch.maximum),
    "gt": (2, operator.gt),
    "ge": (2, operator.ge),
    "lt": (2, operator.lt),
    "le": (2, operator.le),
    "eq": (2, operator.eq),
    "ne": (2, operator.ne),
    "and": (2, torch.logical_and),
    "or": (2, torch.logical_or),
    "not": (1, torch.logical_not),
    "where": (3, torch.where),
    "clamp": (3, torch.clamp),
    "neg": (1, torch.neg),
    "abs": (1, torch.abs),
    "exp": (1, torch.exp),
    "expm1": (1, torch.expm1),
    "log": (1, torch.log),
    "log1p": (1, torch.log1p),
    "sqrt": (1, torch.sqrt),
    "rsqrt": (1, torch.rsqrt),
    "square": (1, torch.square),
    "reciprocal": (1, torch.reciprocal),
    "tanh": (1, torch.tanh),
    "sigmoid": (1, torch.sigmoid),
    "logsigmoid": (1, F.logsigmoid),
    "softplus": (1, F.softplus),
    "relu": (1, torch.relu),
    "detach": (1, torch.detach),
    "number": (1, lambda flag: flag * 1.0),  # 0 or 1
}
_STATISTIC = re.compile(r"(loss|lse|entropy|argmax)|chosen(\d+)")

Argument = str | float


@dataclass(frozen=True)
class RowProgram:
    """Instructions: an operation's name and its arguments."""

    instructions: tuple[tuple[str, tuple[Argument, ...]], ...]

    @property
    def statistics(self) -> tuple[str, ...]:
        """The fields of :class:`RowStatistics` it reads."""
        names = (
            _STATISTIC.fullmatch(each) for _, given in self.instructions for each in given if isinstance(each, str)
        )
        return tuple(sorted({match[1] or "chosen" for match in names if match}))

    @property
    def operands(self) -> int:
        """How many operands it reads."""
        names = [each for _, given in self.instructions for each in given if isinstance(each, str)]
        return max((int(name[1:]) + 1 for name in names if name[0] == "r"), default=0)

    def run(self, found: RowStatistics, operands: Sequence[Tensor]) -> Tensor:
        """l_n of R rows (R,), differentiable; ``operands`` are (R,) or ()."""
        results: list[Any] = []
        for name, given in self.instructions:
            values = [_read(each, found, operands, results) for each in given]
            results.append(OPERATIONS[name][1](*values))
        some = next(value for value in found if value is not None)
        dtype = some.dtype if some.is_floating_point() else operands[0].dtype
        result: Tensor = results[-1]
        return result.to(dtype).expand(some.shape[0])


def _read(argument: Argument, found: RowStatistics, operands: Sequence[Tensor], results: Sequence[Any]) -> Any:
    if not isinstance(argument, str):
        return argument
    if argument[0] == "%":
        return results[int(argument[1:])]
    if argument[0] == "r":
        return operands[int(argument[1:])]
    match = _STATISTIC.fullmatch(argument)
    assert match is not None
    value = getattr(found, match[1] or "chosen")
    return value if match[1] else value[:, int(match[2])]


@lru_cache(maxsize=256)
def parse_row_program(text: str) -> RowProgram:
    """Read the string form.

    Raises:
        StructflyError: an operation or an argument is unknown, or an operation has another number of arguments.
    """
    instructions: list[tuple[str, tuple[Argument, ...]]] = []
    for place, line in enumerate(text.split(";")):
        name, *words = line.split(" ")
        count = OPERATIONS.get(name, (-1, None))[0]
        if count != len(words):
            known = f"{count} arguments" if count >= 0 else f"one of {', '.join(OPERATIONS)}"
            raise StructflyError(f"row program {text!r}: instruction {line!r}; expected {known}")
        instructions.append((name, tuple(_argument(word, place, text) for word in words)))
    return RowProgram(tuple(instructions))


def _argument(word: str, place: int, text: str) -> Argument:
    if _STATISTIC.fullmatch(word) or re.fullmatch(r"r\d+", word):
        return word
    if re.fullmatch(r"%\d+", word) and int(word[1:]) < place:
        return word
    try:
        return float(word)
    except ValueError:
        raise StructflyError(
            f"row program {text!r}: argument {word!r} is no statistic, operand (r0), earlier result (%0) or number"
        ) from None


@dataclass(frozen=True)
class RowLoss:
    """A program with its operands, (N,) or () each, in the accumulation dtype, or bool."""

    program: RowProgram
    operands: tuple[Tensor, ...]

    def rows(self, part: slice) -> RowLoss:
        """That of some rows."""
        return RowLoss(self.program, tuple(each[part] if each.ndim else each for each in self.operands))

    def differentiate(self, found: RowStatistics) -> tuple[Tensor, Coefficients]:
        """l_n (R,), and its derivatives by each row's statistics; none by ``argmax``."""
        with recording_gradients():
            leaves = {
                name: value.clone().requires_grad_()
                for name in self.program.statistics
                if name != "argmax" and (value := getattr(found, name)) is not None
            }
            losses = self.program.run(found._replace(**leaves), [each.clone() for each in self.operands])
            factors: tuple[Tensor | None, ...] = (None,) * len(leaves)
            if losses.requires_grad:
                factors = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True)
        return losses.detach(), Coefficients(**dict(zip(leaves, factors, strict=True)))

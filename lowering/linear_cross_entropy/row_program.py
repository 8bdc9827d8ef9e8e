"""A loss of single rows, or of groups of rows, written by the user, as a program over their statistics.

With l_n = program(statistics of row n, operands of row n) and L = sum_n l_n, the coefficients of the row's statistics
are dl_n / dloss_n, dl_n / dlse_n and so on: functions of that row alone, known as soon as its chunk's statistics are.
So the gradients are made in the same pass (coefficient class B), whatever the program is.

The same holds for groups of rows that follow one another, with l_g = program(statistics and operands of group g) and
L = sum_g l_g, as long as a chunk holds whole groups (class C).  A group of shape (d_1, ..., d_k) has d_1 ... d_k rows,
and the program sees values (G, d_1, ..., d_k) of G groups, with a size of 1 where a value is the same along a
dimension: all is pointwise and broadcasts, but for ``sum`` over a dimension of the group and ``part``, one place of it.

The program is a string, an argument of the op: instructions joined by ``;``, each an operation and its arguments joined
by spaces.  Arguments are statistics (``loss``, ``lse``, ``entropy``, ``argmax``, ``chosen0``, ``chosen1``, ...),
operands ``r0``, ``r1``, ..., results of earlier instructions ``%0``, ``%1``, ..., and numbers.  The last result is l_n.
For instance, the clipped ratio of PPO with the old log-probability r0 and the advantage r1 (``loss`` is minus the
log-probability):

    neg loss;sub %0 r0;exp %1;mul %2 r1;clamp %2 0.8 1.2;mul %4 r1;min %3 %5;neg %6

DPO, for groups (2, T), a better and a worse sequence of T tokens, with the mask r0 and the references' difference r1:

    mul loss r0;sum %0 2;part %1 1 1;part %1 1 0;sub %2 %3;sub %4 r1;mul %5 0.1;logsigmoid %6;neg %7
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
    # Of dimensions of the group, counted from 1; sizes of 1 stay.
    "sum": (2, lambda value, dim: value.sum(int(dim), keepdim=True)),
    "part": (3, lambda value, dim, place: value.narrow(int(dim), int(place), 1)),
}
_OF_GROUPS = ("sum", "part")
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

    @property
    def dimensions(self) -> int:
        """How many dimensions a group must have."""
        return max((int(given[1]) for name, given in self.instructions if name in _OF_GROUPS), default=0)

    def run(self, found: RowStatistics, operands: Sequence[Tensor], group: Sequence[int] = ()) -> Tensor:
        """l_g (G,) of the G groups that R rows make, or without a group l_n (R,), differentiable.

        Args:
            operands: (G, *sizes), each size the group's or 1, or ().
            group: the shape of a group, whose rows follow one another.
        """
        results: list[Any] = []
        for name, given in self.instructions:
            values = [_read(each, found, operands, results, group) for each in given]
            results.append(OPERATIONS[name][1](*values))
        some = next(value for value in found if value is not None)
        dtype = some.dtype if some.is_floating_point() else operands[0].dtype
        result: Tensor = results[-1].to(dtype)
        groups = some.shape[0] // math.prod(group)
        return result.flatten(1).sum(1) if result.ndim > 1 else result.expand(groups)


def _read(
    argument: Argument,
    found: RowStatistics,
    operands: Sequence[Tensor],
    results: Sequence[Any],
    group: Sequence[int],
) -> Any:
    if not isinstance(argument, str):
        return argument
    if argument[0] == "%":
        return results[int(argument[1:])]
    if argument[0] == "r":
        return operands[int(argument[1:])]
    match = _STATISTIC.fullmatch(argument)
    assert match is not None
    value = getattr(found, match[1] or "chosen")
    value = value if match[1] else value[:, int(match[2])]
    return value.view(-1, *group) if group else value


@lru_cache(maxsize=256)
def parse_row_program(text: str) -> RowProgram:
    """Read the string form.

    Raises:
        StructflyError: an operation or an argument is unknown, or an operation has another number of arguments, or
            names a dimension of a group, or a place along it, by something that is no such number.
    """
    instructions: list[tuple[str, tuple[Argument, ...]]] = []
    for place, line in enumerate(text.split(";")):
        name, *words = line.split(" ")
        count = OPERATIONS.get(name, (-1, None))[0]
        if count != len(words):
            known = f"{count} arguments" if count >= 0 else f"one of {', '.join(OPERATIONS)}"
            raise StructflyError(f"row program {text!r}: instruction {line!r}; expected {known}")
        given = tuple(_argument(word, place, text) for word in words)
        if name in _OF_GROUPS and not all(map(_counts, given[1:], (1, 0))):
            raise StructflyError(
                f"row program {text!r}: instruction {line!r}; a group's dimensions count from 1 and its places from 0"
            )
        instructions.append((name, given))
    return RowProgram(tuple(instructions))


def _counts(argument: Argument, first: int) -> bool:
    """Whether an argument is a whole number from ``first`` up."""
    return isinstance(argument, float) and argument.is_integer() and argument >= first


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
    """A program with its operands, as :meth:`RowProgram.run` takes them, in the accumulation dtype, or bool."""

    program: RowProgram
    operands: tuple[Tensor, ...]
    group: tuple[int, ...] = ()

    @property
    def group_rows(self) -> int:
        """How many rows make a group."""
        return math.prod(self.group)

    def rows(self, part: slice) -> RowLoss:
        """That of some rows, which are whole groups."""
        groups = slice(part.start // self.group_rows, part.stop // self.group_rows)
        return replace(self, operands=tuple(each[groups] if each.ndim else each for each in self.operands))

    def differentiate(self, found: RowStatistics) -> tuple[Tensor, Coefficients]:
        """The groups' losses (G,), and the derivatives of their sum by each row's statistics; none by ``argmax``."""
        with recording_gradients():
            leaves = {
                name: value.clone().requires_grad_()
                for name in self.program.statistics
                if name != "argmax" and (value := getattr(found, name)) is not None
            }
            losses = self.program.run(found._replace(**leaves), [each.clone() for each in self.operands], self.group)
            factors: tuple[Tensor | None, ...] = (None,) * len(leaves)
            if losses.requires_grad:
                factors = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True)
        return losses.detach(), Coefficients(**dict(zip(leaves, factors, strict=True)))

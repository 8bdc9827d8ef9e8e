"""The pointwise chain between the head's linear and its loss, as one string.

The string travels as an argument of the op, so that a compile cache never serves another chain's code.  It lists the
steps in order, each an operation of :mod:`~structfly.lowering.head.operations` with its operands:
``"div:30.0,tanh,mul:30.0"`` is Gemma's soft cap.  An operand is a number, or one of the tensors that go with the
string: ``"mul:scalar0,add:class1"`` multiplies all logits by tensor 0, one number, and adds tensor 1, one number a
class.  The empty string is the identity.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, cast

import torch
from torch import Tensor

from structfly.errors import StructflyError
from structfly.lowering.head.operations import OPERATIONS, Operation, evaluate, in_kernel, names

Kind = Literal["scalar", "row", "class"]
KINDS: tuple[Kind, ...] = ("scalar", "row", "class")


@dataclass(frozen=True)
class Operand:
    """Tensor ``index`` of those that go with a chain: () if it is a scalar, (N,) one number a row, (C,) one a class."""

    kind: Kind
    index: int

    def __str__(self) -> str:
        return f"{self.kind}{self.index}"


@dataclass(frozen=True)
class Step:
    """One operation and its operands."""

    name: str
    operands: tuple[float | Operand, ...] = ()

    def __str__(self) -> str:
        return ":".join((self.name, *map(_spelt, self.operands)))

    @property
    def operation(self) -> Operation:
        return OPERATIONS[self.name]

    @property
    def scales(self) -> bool:
        """True if the step multiplies by one number."""
        constants = all(isinstance(operand, float) for operand in self.operands)
        return self.name in ("mul", "div", "neg") and constants

    @property
    def one_slope_a_row(self) -> bool:
        """True if dy/du is the same for all classes of a row."""
        by_class = any(isinstance(operand, Operand) and operand.kind == "class" for operand in self.operands)
        return self.operation.affine and ("a" not in names(self.operation.gradient) or not by_class)

    def tensors(self) -> Iterable[tuple[Operand, str | None]]:
        """The operands that are tensors, each with the expression of its gradient, None for a condition."""
        for operand, gradient in zip(self.operands, self.operation.operands, strict=True):
            if isinstance(operand, Operand):
                yield operand, gradient


# What becomes of a product whose sum is an operand's gradient: (index, product, its factor).
Take = Callable[[int, Tensor, "Tensor | float"], None]


@dataclass(frozen=True)
class Epilogue:
    """A chain of steps ``u = f_k(...f_1(z))`` applied to every logit."""

    steps: tuple[Step, ...] = ()

    def __str__(self) -> str:
        return ",".join(map(str, self.steps))

    @cached_property
    def operands(self) -> tuple[Operand, ...]:
        """The tensors that go with the chain, in order."""
        found = {operand.index: operand for step in self.steps for operand, _ in step.tensors()}
        return tuple(found[index] for index in sorted(found))

    @cached_property
    def conditions(self) -> frozenset[int]:
        """Which of ``operands`` are conditions; all others are numbers."""
        return frozenset(o.index for step in self.steps for o, gradient in step.tensors() if gradient is None)

    @cached_property
    def leading(self) -> int:
        """How many steps at the beginning have one slope for all classes of a row."""
        return next((i for i, step in enumerate(self.steps) if not step.one_slope_a_row), len(self.steps))

    @property
    def slopes_vary(self) -> bool:
        """True if the chain's slope is not the same for all classes of a row."""
        return self.leading < len(self.steps)

    def of_classes_after_leading(self, wanted: Sequence[bool]) -> list[Operand]:
        """The wanted operands with one number a class that steps after the leading ones read."""
        late = [operand for step in self.steps[self.leading :] for operand, _ in step.tensors()]
        return [operand for operand in late if operand.kind == "class" and wanted and wanted[operand.index]]

    @cached_property
    def linear(self) -> bool:
        """True if the chain only multiplies by numbers."""
        return all(step.scales for step in self.steps)

    @cached_property
    def scale(self) -> float:
        """What a linear chain multiplies by."""
        assert self.linear
        return float(self.apply(torch.ones((), dtype=torch.float64), ()))

    @cached_property
    def has_steepest(self) -> bool:
        """True if the slope of the chain has a bound."""
        return all(step.operation.steepest is not None for step in self.steps)

    def steepest(self, operands: Sequence[Tensor]) -> Tensor | float:
        """The largest that the chain's slope can be, for a chain that has a bound: a number, or ()."""
        bound: Tensor | float = 1.0
        for step in self.steps:
            here = evaluate(step.operation.steepest or "", **self._operands_of(step, operands))
            bound = bound * (here.amax() if isinstance(here, Tensor) else here)
        return bound

    @cached_property
    def without_dead_classes(self) -> tuple[Epilogue, tuple[Step, ...]]:
        """The chain up to the steps at its end that set classes to -inf, and those steps."""
        count = len(self.steps)
        while count and _kills_classes(self.steps[count - 1]):
            count -= 1
        return (self if count == len(self.steps) else Epilogue(self.steps[:count])), self.steps[count:]

    # ------------------------------------------------------------------------------------------------ on tensors

    def apply(self, z: Tensor, operands: Sequence[Tensor]) -> Tensor:
        """The chain on logits (..., C), or on one number if no operand is a row's or a class's; differentiable: its
        definition."""
        for step in self.steps:
            z = evaluate(step.operation.value, u=z, **self._operands_of(step, operands))
        return z

    def values(self, z: Tensor, operands: Sequence[Tensor], needed: Collection[int]) -> list[Tensor]:
        """``z`` and the value after each step; of those not ``needed``, all but the last may be overwritten."""
        values = [z]
        for number, step in enumerate(self.steps):
            known = self._operands_of(step, operands)
            overwrite = None if number in needed else _IN_PLACE.get(step.name)
            if overwrite is not None:
                values.append(overwrite(values[-1], *known.values()))
            else:
                values.append(evaluate(step.operation.value, u=values[-1], **known))
        return values

    def needed(self, wanted: Sequence[bool]) -> frozenset[int]:
        """Which of ``values`` :meth:`pull_back` reads."""
        needed: set[int] = set()
        for number, step in enumerate(self.steps):
            expressions = [gradient for operand, gradient in step.tensors() if gradient and wanted[operand.index]]
            read = names(step.operation.gradient).union(*map(names, expressions))
            needed.update(place for place, name in ((number, "u"), (number + 1, "y")) if name in read)
        return frozenset(needed)

    def pull_back(
        self, g: Tensor, values: Sequence[Tensor], operands: Sequence[Tensor], wanted: Sequence[bool], take: Take
    ) -> tuple[Tensor, Tensor | float]:
        """The gradient with respect to z (R, C) from ``g``, that with respect to f(z), which is overwritten.

        Args:
            values: of :meth:`values`; those that :meth:`needed` leaves out may be anything.
            wanted: whether the gradient with respect to each operand is wanted; it is the sum, over what the operand
                is the same for, of all products that ``take`` is given for it.

        Returns:
            a tensor and the factor, a number or (R, 1) or (), that it still has to be multiplied by.
        """
        factor: Tensor | float = 1.0
        for number, step in reversed(list(enumerate(self.steps))):
            known = {"g": g, "u": values[number], "y": values[number + 1], **self._operands_of(step, operands)}
            for operand, gradient in step.tensors():
                if gradient is not None and wanted[operand.index]:
                    take(operand.index, evaluate(gradient, **known), factor)
            in_place = _GRADIENT_IN_PLACE.get(step.name)
            if in_place is not None:
                g = in_place(g, values[number + 1], grad_input=g)
            elif step.one_slope_a_row:
                factor = evaluate(step.operation.gradient, **{**known, "g": factor})
            else:
                g = evaluate(step.operation.gradient, **known)
        return g, factor

    def _operands_of(self, step: Step, operands: Sequence[Tensor]) -> dict[str, Any]:
        return {name: _against_logits(operand, operands) for name, operand in zip("ab", step.operands, strict=False)}

    # ------------------------------------------------------------------------------------------------ as source

    def source(self, wanted: Sequence[bool] = ()) -> tuple[tuple[object, ...], ...]:
        """For each step what templates need: its name, the source of its value and of its gradient, and for each
        wanted operand the operand's index and the source of its gradient.

        Step i turns ``u{i}`` into ``u{i + 1}``; operand k is ``o{k}``, the gradient ``g``.
        """
        return tuple(self._source_of(number, step, wanted) for number, step in enumerate(self.steps))

    def _source_of(self, number: int, step: Step, wanted: Sequence[bool]) -> tuple[object, ...]:
        known = {"g": "g", "u": f"u{number}", "y": f"u{number + 1}"}
        step = _without_division(step)
        for name, operand in zip("ab", step.operands, strict=False):
            known[name] = f"o{operand.index}" if isinstance(operand, Operand) else _number(operand)
        gradients = tuple(
            (operand.index, in_kernel(gradient, **known))
            for operand, gradient in step.tensors()
            if gradient is not None and wanted and wanted[operand.index]
        )
        operation = step.operation
        return step.name, in_kernel(operation.value, **known), in_kernel(operation.gradient, **known), gradients


# Values and gradients that torch computes in place and in one pass, without a buffer for every operation.
_IN_PLACE: dict[str, Callable[..., Tensor]] = {
    name: getattr(Tensor, f"{name}_") for name in ("add", "sub", "mul", "div", "neg", "exp", "tanh", "sigmoid")
}
_GRADIENT_IN_PLACE: dict[str, Callable[..., Tensor]] = {
    "tanh": torch.ops.aten.tanh_backward.grad_input,
    "sigmoid": torch.ops.aten.sigmoid_backward.grad_input,
}


def _against_logits(operand: float | Operand, tensors: Sequence[Tensor]) -> float | Tensor:
    """The operand, shaped so that it broadcasts against logits (R, C)."""
    if not isinstance(operand, Operand):
        return operand
    tensor = tensors[operand.index]
    return tensor.unsqueeze(-1) if operand.kind == "row" else tensor


def _kills_classes(step: Step) -> bool:
    if step.name not in ("where", "masked_fill"):
        return False
    condition, fill = step.operands
    return isinstance(condition, Operand) and condition.kind == "class" and fill == -math.inf


def _without_division(step: Step) -> Step:
    """The step in a kernel, which divides by a number no faster than by a tensor; no reciprocal leaves float32."""
    by = step.operands[0] if step.name == "div" else None
    return Step("mul", (1 / by,)) if isinstance(by, float) and 2.0**-100 < abs(by) < 2.0**100 else step


def _spelt(operand: float | Operand) -> str:
    return str(operand) if isinstance(operand, Operand) else repr(operand)


def _number(value: float) -> str:
    return f"({value!r})" if math.isfinite(value) else f'float("{value!r}")'


# ---------------------------------------------------------------------------------------------------- reading

_OPERAND = re.compile(rf"({'|'.join(KINDS)})(\d+)")


@lru_cache(maxsize=256)
def parse_epilogue(text: str) -> Epilogue:
    """Read the string form.

    Raises:
        StructflyError: the text names an unknown step, has too many or too few operands for one, a number that it
            cannot take, or tensors that are not numbered from 0 on, each of one kind.
    """
    epilogue = Epilogue(tuple(_step(word, text) for word in filter(None, text.split(","))))
    uses = {operand for step in epilogue.steps for operand, _ in step.tensors()}
    numbers = {o.index for step in epilogue.steps for o, gradient in step.tensors() if gradient is not None}
    if sorted(operand.index for operand in uses) != list(range(len(uses))) or numbers & epilogue.conditions:
        raise StructflyError(
            f"the operands of epilogue {text!r} are {', '.join(sorted(map(str, uses)))}; number them from 0 on, each "
            "of one kind and either a condition or a number"
        )
    return epilogue


def _step(word: str, text: str) -> Step:
    name, *operands = word.split(":")
    if name not in OPERATIONS:
        raise StructflyError(f"epilogue step {word!r} of {text!r} is not known; there are {', '.join(OPERATIONS)}")
    step = Step(name, tuple(map(_operand, operands)))
    gradients = step.operation.operands
    fits = len(operands) == len(gradients) and all(
        isinstance(operand, Operand) or (gradient is not None and _may_be(operand, name))
        for operand, gradient in zip(step.operands, gradients, strict=True)
    )
    if not fits:
        takes = ["a tensor" if gradient is None else "a number or tensor" for gradient in gradients]
        raise StructflyError(
            f"epilogue step {word!r} of {text!r}: {name} takes {' and '.join(takes) or 'no operand'}; a tensor is "
            "'scalar<n>', 'row<n>' or 'class<n>', a number finite (a fill may be infinite, a divisor may not be 0)"
        )
    return step


def _operand(text: str) -> float | Operand:
    match = _OPERAND.fullmatch(text)
    if match is not None:
        return Operand(cast(Kind, match[1]), int(match[2]))
    try:
        return float(text)
    except ValueError:
        return math.nan


def _may_be(number: float, name: str) -> bool:
    if name in ("where", "masked_fill"):
        return not math.isnan(number)
    return math.isfinite(number) and not (name == "div" and number == 0.0)

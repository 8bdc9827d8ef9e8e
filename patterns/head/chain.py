"""The pointwise chain between a linear and its loss, read from the graph one operation at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from structfly.compat import expression
from structfly.lowering.head import epilogue
from structfly.lowering.head.linear import DTYPES
from structfly.rewriter.calls import Call
from structfly.rewriter.region import example


@dataclass(frozen=True)
class Place:
    """Where in a path a step stands: after how many views, and with which dimension for the classes."""

    views: int
    class_dim: int


@dataclass(frozen=True)
class TensorOperand:
    """A tensor of the graph that a step takes.

    Attributes:
        node: its value broadcasts against the logits.
        kind: whether it is one number, or one a row, or one a class.
        condition: it chooses between two values.
        place: where a row's operand meets the logits; None for others, which no view of rows moves.
    """

    node: fx.Node
    kind: epilogue.Kind
    condition: bool = False
    place: Place | None = None


@dataclass(frozen=True)
class LeadingClasses:
    """The condition that holds for the first ``count`` classes."""

    count: int
    kind: epilogue.Kind = "class"


Operand = TensorOperand | LeadingClasses


@dataclass(frozen=True)
class ChainStep:
    """One operation, by its name in the op's epilogue, and its operands."""

    name: str
    operands: tuple[float | Operand, ...] = ()


@dataclass(frozen=True)
class Chain:
    """The steps in order."""

    steps: tuple[ChainStep, ...] = ()

    @property
    def operands(self) -> tuple[Operand, ...]:
        """The operands that are tensors, each once."""
        every = (operand for step in self.steps for operand in step.operands if not isinstance(operand, float))
        return tuple(dict.fromkeys(every))

    @property
    def epilogue(self) -> epilogue.Epilogue:
        """The chain as the op takes it, with ``operands`` as its tensors."""
        places = {operand: epilogue.Operand(operand.kind, index) for index, operand in enumerate(self.operands)}
        return epilogue.Epilogue(
            tuple(
                epilogue.Step(step.name, tuple(o if isinstance(o, float) else places[o] for o in step.operands))
                for step in self.steps
            )
        )


class StepError(Exception):
    """Why an operation is no step of a chain."""


def read_steps(call: Call, logits: fx.Node, place: Place, dtype: torch.dtype) -> tuple[ChainStep, ...]:
    """What ``call`` does to its operand ``logits``, as steps; ``dtype`` is that of the linear's value.

    Raises:
        StepError: it does something that the op's epilogue cannot.
    """
    return _Reader(call, logits, place, dtype).read()


def describe(node: fx.Node) -> str:
    """A node as reports name it: what it calls, and its own name."""
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return f"{target} ({node.name})"


_REVERSED = {"add": "add", "mul": "mul", "sub": "rsub", "div": "rdiv"}
_UNARY = ("neg", "exp", "tanh", "sigmoid")
_BOUNDS = ("clamp", "clamp_min", "clamp_max")
POINTWISE = (*_REVERSED, *_UNARY, *_BOUNDS, "where", "masked_fill")


class _Reader:
    def __init__(self, call: Call, logits: fx.Node, place: Place, dtype: torch.dtype) -> None:
        self.call, self.logits, self.place, self.dtype = call, logits, place, dtype
        self.what = describe(call.node)

    def read(self) -> tuple[ChainStep, ...]:
        call = self.call
        extra = set(call.arguments) - {"input", "other", "condition", "mask", "value", "min", "max"}
        changed = [name for name in extra if call[name] not in (None, 1 if name == "alpha" else None)]
        if changed:
            raise StepError(f"{self.what} with {', '.join(sorted(changed))} is not read")
        before, after = example(self.logits), example(call.node)
        if before is None or after is None or not _same_sizes(before, after):
            raise StepError(f"{self.what} broadcasts the logits to another shape")
        if call.op in _REVERSED:
            first = call["input"] is self.logits
            other = self.operand(call["other"] if first else call["input"])
            name = call.op if first else _REVERSED[call.op]
            if name == "div" and other == 0.0:
                raise StepError(f"{self.what} divides by 0")
            return (ChainStep(name, (other,)),)
        if call.op in _UNARY:
            return (ChainStep(call.op),)
        return self._clamp() if call.op in _BOUNDS else self._choice()

    def _clamp(self) -> tuple[ChainStep, ...]:
        bounds = {name: self.call.get(name) for name in ("min", "max") if self.call.get(name) is not None}
        if len(bounds) == 2 and any(isinstance(bound, fx.Node) for bound in bounds.values()):
            raise StepError(f"{self.what}: of two bounds a tensor is one")
        return tuple(ChainStep(f"clamp_{name}", (self.operand(bound),)) for name, bound in bounds.items())

    def _choice(self) -> tuple[ChainStep, ...]:
        call = self.call
        if call.op == "where":
            kept = call["input"] is self.logits
            condition, fill = call["condition"], call["other"] if kept else call["input"]
        else:
            kept, condition, fill = False, call["mask"], call["value"]
        operands = (self.operand(condition, condition=True), self.operand(fill, finite=False))
        return (ChainStep("where" if kept else "masked_fill", operands),)

    def operand(self, value: Any, *, condition: bool = False, finite: bool = True) -> float | Operand:
        """A number or a tensor of the graph, as an operand."""
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not condition:
            if math.isnan(value) or (finite and math.isinf(value)):
                raise StepError(f"{self.what} by {value}")
            return float(value)
        tensor = example(value)
        if not isinstance(value, fx.Node) or tensor is None:
            raise StepError(f"{self.what} takes {value}, which is neither a constant number nor a tensor")
        self._check(value, tensor, condition)
        varies = self._dimensions(tensor)
        if not varies:
            return TensorOperand(value, "scalar", condition)
        if varies == {self.place.class_dim}:
            return TensorOperand(value, "class", condition)
        if self.place.class_dim in varies:
            what = "flag" if condition else "number"
            raise StepError(f"{self.what} takes {value.name}, which has a {what} for each row and class")
        return TensorOperand(value, "row", condition, self.place)

    def _check(self, node: fx.Node, tensor: torch.Tensor, condition: bool) -> None:
        if condition:
            if tensor.dtype != torch.bool:
                raise StepError(f"{self.what}: its condition {node.name} is {tensor.dtype}, not torch.bool")
        elif tensor.dtype.is_complex or (tensor.dtype.is_floating_point and tensor.dtype not in DTYPES):
            raise StepError(f"{self.what} takes {node.name}, which is {tensor.dtype}")
        elif tensor.dtype == torch.float64 != self.dtype:
            raise StepError(f"{self.what} takes {node.name}, which is wider than the float32 that the head computes in")

    def _dimensions(self, tensor: torch.Tensor) -> set[int]:
        """The logits' dimensions along which an operand varies."""
        logits = example(self.logits)
        assert logits is not None
        behind = logits.ndim - tensor.ndim
        return {behind + dim for dim, size in enumerate(tensor.shape) if expression(size) != 1}


def _same_sizes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return [expression(size) for size in one.shape] == [expression(size) for size in other.shape]

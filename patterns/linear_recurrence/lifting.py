"""What a step computes, computed for all steps at once.

A lifted value has time as its first dimension and the dimensions of a step's value behind it.  Operations on numbers of
the same place are then the same operations, where time is the first dimension of both operands or one of them has none;
operations on given dimensions count one more.  Time is moved and not copied, so that memory stays as the source has it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from structfly.patterns.linear_recurrence.expressions import (
    EXPRESSIONS,
    Bounds,
    Expression,
    Number,
    Operation,
    Part,
    Shared,
    State,
    inner,
    mapped,
)
from structfly.patterns.linear_recurrence.slices import WHOLE, Span
from structfly.patterns.linear_recurrence.steps import Run
from structfly.rewriter.editor import Editor
from structfly.rewriter.region import example

_OPERATORS = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv}
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "neg": torch.neg,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "log": torch.log,
    "log1p": torch.log1p,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "logsigmoid": F.logsigmoid,
    "softplus": F.softplus,
    "relu": torch.relu,
    "silu": F.silu,
    "clamp": torch.clamp,
    "clamp_min": torch.clamp_min,
    "clamp_max": torch.clamp_max,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "square": torch.square,
    "pow": operator.pow,
    "reciprocal": torch.reciprocal,
    "abs": torch.abs,
    "minimum": torch.minimum,
    "maximum": torch.maximum,
    "logaddexp": torch.logaddexp,
    "gt": operator.gt,
    "ge": operator.ge,
    "lt": operator.lt,
    "le": operator.le,
    "eq": operator.eq,
    "ne": operator.ne,
    "and": torch.logical_and,
    "or": torch.logical_or,
    "not": torch.logical_not,
    "where": torch.where,
    "masked_fill": torch.masked_fill,
    "lerp": torch.lerp,
    "addcmul": torch.addcmul,
    "detach": torch.detach,
    "clone": torch.clone,
}
_METHODS = ("to", "float", "half", "bfloat16", "double", "type_as", "contiguous")
_PRODUCTS = ("linear", "matmul")
_DIMENSIONS = ("chunk", "split", "unbind", "unsqueeze", "squeeze", "permute", "cat", "stack")


def why_not_lifted(value: Expression) -> tuple[fx.Node, str] | None:
    """The operation in ``value`` that cannot be done to all steps at once, and why."""
    pending, seen = [value], set()
    while pending:
        each = pending.pop()
        if id(each) in seen or not isinstance(each, Operation):
            continue
        seen.add(id(each))
        reason = _why_not(each)
        if reason and each.node is not None:
            return each.node, reason
        pending.extend(inner(each))
    return None


def _why_not(value: Operation) -> str:
    op = value.op
    if op in ("and", "or", "not") and value.node is not None:
        tensor = example(value.node)
        return "" if tensor is not None and tensor.dtype == torch.bool else f"bitwise {op} of numbers"
    if op in _FUNCTIONS or op in _METHODS or op == "getitem":
        return ""
    if op in _PRODUCTS:
        others = [each for name, each in value.arguments if name != "input" and isinstance(each, EXPRESSIONS)]
        if all(isinstance(each, Shared) for each in others) and not isinstance(value["input"], Shared):
            return "" if op == "linear" or _ndim(others[0]) == 2 else "a product with an operand that is no matrix"
        return f"a {op} whose matrix differs from step to step"
    if op in _DIMENSIONS and isinstance(value.get("dim", 0), int):
        return ""
    return f"{op} is not known to be the same for all steps at once; compute it from the whole tensor, before the loop"


def _ndim(value: Expression) -> int:
    tensor = example(value.node) if isinstance(value, Shared) else None
    return -1 if tensor is None else tensor.ndim


class Lifted(NamedTuple):
    """A value for all steps.

    Attributes:
        value: a node, or a number.
        timed: whether its first dimension is time; otherwise it is the same in all steps.
    """

    value: Any
    timed: bool

    @property
    def rank(self) -> int:
        """Dimensions of a step's value."""
        tensor = example(self.value)
        return 0 if tensor is None else tensor.ndim - self.timed


class Lifting:
    """Lifts expressions of one loop.

    Args:
        editor: writes.
        parts: the sequences, time first, by the number of their :class:`Part`.
        state: what stands for the state, if expressions have it.
    """

    def __init__(self, editor: Editor, parts: Callable[[int], fx.Node], state: fx.Node | None = None) -> None:
        self._editor, self._parts, self._state = editor, parts, state
        self._made: dict[Expression, Lifted] = {}

    def __call__(self, value: Expression) -> Lifted:
        if value not in self._made:
            self._made[value] = self._of(value)
        return self._made[value]

    def _of(self, value: Expression) -> Lifted:
        if isinstance(value, Number):
            return Lifted(value.value, False)
        if isinstance(value, Shared):
            return Lifted(self._editor.current(value.node), False)
        if isinstance(value, Part):
            return Lifted(self._parts(value.number), True)
        if isinstance(value, State):
            assert self._state is not None
            return Lifted(self._state, True)
        lifted = [self(each) for each in inner(value)]
        timed = any(each.timed for each in lifted)
        if value.op in _FUNCTIONS or value.op in _METHODS:
            rank = max((each.rank for each in lifted), default=0)
            arguments = {name: mapped(each, lambda e: self._aligned(e, rank)) for name, each in value.arguments}
            if value.op == "where":
                arguments = self._of_its_dtype(value, arguments)
            return Lifted(self._pointwise(value.op, arguments), timed)
        return Lifted(self._moved(value, timed), timed)

    def _pointwise(self, op: str, arguments: dict[str, Any]) -> fx.Node:
        if op in ("sub", "neg"):
            arguments = {name: self._number(each) for name, each in arguments.items()}
        values = tuple(arguments.values())
        if op in _METHODS:
            targets = arguments.pop("to", ())
            operands = [arguments.pop(name) for name in ("input", "other") if name in arguments]
            return self._editor.method(op, *operands, *targets, **arguments)
        if op in _OPERATORS and set(arguments) == {"input", "other"}:
            return self._editor.call(_OPERATORS[op], *values)
        if op == "where":
            return self._editor.call(torch.where, arguments["condition"], arguments["input"], arguments["other"])
        first = arguments.pop("input")
        named = {name: each for name, each in arguments.items() if name not in ("other", "inplace")}
        positional = (first, arguments["other"]) if "other" in arguments else (first,)
        return self._editor.call(_FUNCTIONS[op], *positional, **named)

    def _of_its_dtype(self, choice: Operation, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a choice between two numbers, which torch makes float32, whatever the state has."""
        like = example(choice.node)
        if like is None or any(isinstance(arguments[name], fx.Node) for name in ("input", "other")):
            return arguments
        one = self._editor.call(torch.full, (), arguments["input"], dtype=like.dtype, device=like.device)
        return {**arguments, "input": one}

    def _number(self, value: Any) -> Any:
        """A mask as 0 and 1, which torch does not subtract: of a state that a mask was multiplied with, say."""
        tensor = example(value)
        return self._editor.method("float", value) if tensor is not None and tensor.dtype == torch.bool else value

    def _aligned(self, value: Expression, rank: int) -> Any:
        """An operand, with dimensions of size 1 between time and its own where others have more."""
        lifted = self(value)
        missing = rank - lifted.rank
        if not lifted.timed or not missing:
            return lifted.value
        return self._editor.call(operator.getitem, lifted.value, (slice(None), *[None] * missing))

    def _moved(self, value: Operation, timed: bool) -> fx.Node:
        """An operation on given dimensions."""
        op, editor = value.op, self._editor
        arguments = {name: mapped(each, lambda e: self(e).value) for name, each in value.arguments}
        if op == "linear":
            return editor.call(F.linear, arguments["input"], arguments["weight"], arguments.get("bias"))
        if op == "matmul":
            return editor.call(torch.matmul, arguments["input"], arguments["other"])
        if op == "getitem":
            index = _index(arguments["index"])
            source = value["input"]
            if isinstance(source, Operation) and source.op in ("chunk", "split", "unbind"):
                return editor.getitem(arguments["input"], index)
            index = index if isinstance(index, tuple) else (index,)
            return editor.call(operator.getitem, arguments["input"], (slice(None), *index) if timed else index)
        if op == "permute":
            dims = arguments["dims"]
            return editor.call(torch.permute, arguments["input"], (0, *(dim + 1 for dim in dims)) if timed else dims)
        dim = arguments.get("dim", 0)
        dim = dim + 1 if timed and dim >= 0 else dim
        if op in ("cat", "stack"):
            operands = [self(each) for each in value["tensors"]]
            return editor.call({"cat": torch.cat, "stack": torch.stack}[op], self._alike(operands), dim)
        if op == "squeeze":
            return editor.call(torch.squeeze, arguments["input"], dim)
        if op == "unsqueeze":
            return editor.call(torch.unsqueeze, arguments["input"], dim)
        if op == "unbind":
            return editor.call(torch.unbind, arguments["input"], dim)
        function = {"chunk": torch.chunk, "split": torch.split}[op]
        sizes = arguments["chunks" if op == "chunk" else "split_size"]
        return editor.call(function, arguments["input"], list(sizes) if isinstance(sizes, tuple) else sizes, dim)

    def _alike(self, operands: list[Lifted]) -> list[fx.Node]:
        """Operands of a join: those without time repeated."""
        timed = next((each.value for each in operands if each.timed), None)
        if timed is None:
            return [each.value for each in operands]

        def repeated(tensor: Tensor, like: Tensor) -> Tensor:
            return tensor.unsqueeze(0).expand(like.shape[0], *[-1] * tensor.ndim)

        return [each.value if each.timed else self._editor.trace(repeated, each.value, timed) for each in operands]


def _index(value: Any) -> Any:
    if isinstance(value, Bounds):
        return slice(value.start, value.stop, value.step)
    return tuple(map(_index, value)) if isinstance(value, tuple) else value


class Steps(NamedTuple):
    """The steps of a loop as part of its sequences.

    Attributes:
        length: how many.
        backward: whether the first step is the last in time.
    """

    length: int
    backward: bool

    def whole(self, run: Run, editor: Editor) -> fx.Node:
        """The slices of all steps, in the order of time, which comes first."""
        (source, dim, place, rest), first, stride = run
        last = first + stride * (self.length - 1)
        node = editor.current(source)
        if dim:
            node = editor.call(torch.movedim, node, dim, 0)
        size = source.meta["example_value"].shape[dim]
        taken: Span = (min(first, last), max(first, last) + 1, abs(stride))
        entries = (WHOLE if taken == (0, size, 1) else taken, *rest)
        if any(entry != WHOLE for entry in entries):
            index = tuple(None if entry is None else slice(*entry) for entry in entries)
            node = editor.call(operator.getitem, node, index)
        if place is not None:
            node = editor.call(torch.unsqueeze, node, place + 1)
        if (stride < 0) != self.backward:
            node = editor.call(torch.flip, node, (0,))
        return node


def steps_of(runs: tuple[Run, ...], length: int) -> Steps:
    """Time goes as most sequences have it, so that as few as possible are turned round."""
    moving = [run.stride for run in runs if run.stride]
    return Steps(length, 2 * sum(stride < 0 for stride in moving) > len(moving))

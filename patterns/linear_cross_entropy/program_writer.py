"""Writing a row program: its instructions, and the operands that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from structfly.patterns.linear_cross_entropy.row_axes import Axis, Dims
from structfly.patterns.linear_cross_entropy.row_loss import GraphValue, Operand
from structfly.patterns.linear_cross_entropy.row_values import NoProgramError
from structfly.rewriter.region import example


class ProgramWriter:
    """A program of :mod:`~structfly.lowering.linear_cross_entropy.row_program` as it grows.

    Instructions name axes of the rows.  Which dimensions of a group these are is known once all are written.
    """

    def __init__(self) -> None:
        self._instructions: list[tuple[str | Axis, ...]] = []
        self._operands: list[Operand] = []

    @property
    def operands(self) -> tuple[Operand, ...]:
        """What the program takes, in order."""
        return tuple(self._operands)

    def emit(self, *words: str | Axis) -> str:
        """Write an instruction, an operation and its arguments, and return how the program calls its result."""
        self._instructions.append(words)
        return f"%{len(self._instructions) - 1}"

    def operand(self, operand: Operand) -> str:
        """How the program calls an operand."""
        if operand not in self._operands:
            self._operands.append(operand)
        return f"r{self._operands.index(operand)}"

    def argument(self, given: Any, node: fx.Node, dims: Dims) -> str:
        """How the program calls what ``node`` takes beside values of rows, whose axes are ``dims``.

        Raises:
            NoProgramError: it is no number and no tensor, or needs a gradient itself.
        """
        if isinstance(given, (int, float)) and not isinstance(given, bool):
            return repr(float(given))
        if not isinstance(given, fx.Node):
            raise NoProgramError("D", f"{node.name} takes {given!r}")
        tensor = example(given)
        if tensor is not None and tensor.requires_grad:
            raise NoProgramError("D", f"{given.name}, an operand of {node.name}, needs a gradient itself")
        if tensor is None and not isinstance(given.meta.get("example_value"), (torch.SymInt, torch.SymFloat)):
            raise NoProgramError("D", f"{given.name} is no tensor")
        return self.operand(GraphValue(given, None if tensor is None or tensor.ndim == 0 else dims))

    def text(self, result: str, inner: Sequence[Axis]) -> str:
        """The program that ends in ``result``; the axes ``inner`` are the dimensions of a group, counted from 1."""
        if result != f"%{len(self._instructions) - 1}":
            self.emit("mul", result, "1.0")
        words = (
            (str(inner.index(word) + 1) if isinstance(word, Axis) else word for word in line)
            for line in self._instructions
        )
        return ";".join(map(" ".join, words))

"""The pointwise chain between the head's linear and its loss: scale, division and tanh, as one string.

The string travels as an argument of the op, so that a compile cache never serves another chain's code.
It lists the steps in order, e.g. ``"div:30.0,tanh,mul:30.0"`` for Gemma's soft cap; the empty string is the identity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from structfly.errors import StructflyError

Operation = Literal["mul", "div", "tanh"]


@dataclass(frozen=True)
class Step:
    """One pointwise step; ``constant`` is the operand of mul and div and 1.0 for tanh."""

    operation: Operation
    constant: float = 1.0

    def __str__(self) -> str:
        return self.operation if self.operation == "tanh" else f"{self.operation}:{self.constant!r}"


@dataclass(frozen=True)
class Epilogue:
    """A chain of steps ``u = f_k(...f_1(z))`` applied to every logit."""

    steps: tuple[Step, ...] = ()

    def __str__(self) -> str:
        return ",".join(map(str, self.steps))

    @property
    def linear(self) -> bool:
        """True if the derivative of the chain is one constant."""
        return all(step.operation != "tanh" for step in self.steps)

    def apply(self, z: Tensor) -> Tensor:
        """The chain on ``z``, out of place and differentiable: its definition."""
        for step in self.steps:
            if step.operation == "mul":
                z = z * step.constant
            elif step.operation == "div":
                z = z / step.constant
            else:
                z = torch.tanh(z)
        return z

    def apply_(self, z: Tensor, *, derivative: bool) -> Tensor | float:
        """The chain on ``z`` in place; returns du/dz, a float if it is one constant, else a tensor of ``z``'s shape.

        With ``derivative=False`` the derivative is not formed and 1.0 is returned.
        """
        slope: Tensor | float = 1.0
        for step in self.steps:
            if step.operation == "mul":
                z.mul_(step.constant)
                slope = slope * step.constant if derivative else slope
            elif step.operation == "div":
                z.div_(step.constant)
                slope = slope / step.constant if derivative else slope
            else:
                torch.tanh(z, out=z)
                if derivative:  # d tanh(a)/da = 1 - tanh(a)^2
                    here = torch.mul(z, z).neg_().add_(1.0)
                    slope = here.mul_(slope)
        return slope


@lru_cache(maxsize=256)
def parse_epilogue(text: str) -> Epilogue:
    """Read the string form.

    Raises:
        StructflyError: the text names an unknown step or a constant that is not finite.
    """
    steps: list[Step] = []
    for word in filter(None, text.split(",")):
        name, _, constant = word.partition(":")
        if name == "tanh" and not constant:
            steps.append(Step("tanh"))
            continue
        try:
            value = float(constant)
        except ValueError:
            value = math.nan
        if name not in ("mul", "div") or not math.isfinite(value) or (name == "div" and value == 0.0):
            raise StructflyError(
                f"epilogue step {word!r} of {text!r} is not known; "
                "write 'mul:<finite>', 'div:<finite, not 0>' or 'tanh', joined by commas"
            )
        steps.append(Step("mul" if name == "mul" else "div", value))
    return Epilogue(tuple(steps))

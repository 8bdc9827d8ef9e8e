"""One gated recurrence under test: its inputs, a step of it, the bytes it must move, and its errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.recurrence_providers import Provider, Recurrence, loop

PASSES = ("forward", "forward+backward")
ARRAYS = (3, 8)
"""Numbers a step and channel that any method moves: f, x and h forward; backward also f, h, dh, df and dx."""
GATES = ("usual", "slow", "ends")
"""Between 0.79 and 0.99; between 0.999 and 1; a third of them 0 and a third 1 exactly."""


@dataclass(frozen=True)
class Case:
    """One problem."""

    shape: tuple[int, int, int]
    dtype: str
    device: str
    training: bool
    gates: str = "usual"

    @property
    def mode(self) -> str:
        """The conditions in one line."""
        sizes = "x".join(map(str, self.shape))
        gates = "" if self.gates == "usual" else f", {self.gates} gates"
        return f"{sizes} {self.dtype}, {PASSES[self.training]}{gates}"

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def state_bytes(self) -> int:
        """Of all states."""
        return self.elements * self._dtype.itemsize

    @property
    def bytes_moved(self) -> int:
        """By any method."""
        return ARRAYS[self.training] * self.state_bytes

    @property
    def _dtype(self) -> torch.dtype:
        found = getattr(torch, self.dtype)
        assert isinstance(found, torch.dtype)
        return found

    @cached_property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """f, x, and the gradient of the states."""
        generator = torch.Generator(self.device).manual_seed(0)
        f = torch.rand(*self.shape, generator=generator, device=self.device)
        if self.gates == "usual":
            f = f * 0.2 + 0.79
        elif self.gates == "slow":
            f = 1 - 1e-3 * f
        else:
            f = torch.where(f < 1 / 3, 0.0, torch.where(f > 2 / 3, 1.0, f))
        x, upstream = (torch.randn(*self.shape, generator=generator, device=self.device) for _ in range(2))
        f, x, upstream = (each.to(self._dtype) for each in (f, x, upstream))
        return f.requires_grad_(), x.requires_grad_(), upstream

    def call(self, provider: Provider) -> Callable[[], tuple[Tensor, ...]]:
        """A step of a provider's, in the layout it wants: the states and, in training, the gradients of f and x."""
        f, x, upstream = self.inputs
        if provider.time_last:
            f, x, upstream = (each.detach().transpose(1, 2).contiguous() for each in (f, x, upstream))
            f, x = f.requires_grad_(), x.requires_grad_()
        function = provider.build()

        def run() -> tuple[Tensor, ...]:
            return step(function, f, x, upstream, training=self.training)

        return run

    def copy(self) -> Callable[[], object]:
        """A copy that moves as many bytes."""
        source = torch.ones(self.bytes_moved // 2, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    @cached_property
    def exact(self) -> tuple[Tensor, ...]:
        """What a step gives in float64, one step after another; the backward written out, for a tape keeps too much."""
        f, x, upstream = (each.detach().double() for each in self.inputs)
        states = loop(f, x)
        if not self.training:
            return (states,)
        passed = torch.zeros_like(states[:, 0])
        gradients = torch.empty_like(states)
        for t in reversed(range(states.shape[1])):
            gradients[:, t] = upstream[:, t] + passed
            passed = f[:, t] * gradients[:, t]
        before = torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], 1)
        return states, gradients * before, gradients

    def errors(self, made: Sequence[Tensor], provider: Provider) -> dict[str, float]:
        """Relative Frobenius errors against :attr:`exact`, by what was made."""
        made = [each.transpose(1, 2) if provider.time_last else each for each in made]
        pairs = zip(("states", "grad_gate", "grad_input"), made, self.exact, strict=False)
        return {name: ((mine.detach().double() - true).norm() / true.norm()).item() for name, mine, true in pairs}


def step(function: Recurrence, f: Tensor, x: Tensor, upstream: Tensor, *, training: bool) -> tuple[Tensor, ...]:
    """The states and, in training, the gradients of gates and inputs."""
    with torch.set_grad_enabled(training):
        states = function(f, x)
    return (states, *torch.autograd.grad(states, [f, x], upstream)) if training else (states,)

"""A whole QRNN layer, and what bounds it: its matrix product alone, and the bytes of its recurrence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.recurrence_case import PASSES
from structfly.nn import QRNN

_GATES = 3  # features of a unit: z, f, o


@dataclass(frozen=True)
class Layer:
    """fo-pooling of a window of two steps."""

    shape: tuple[int, int, int]
    dtype: str
    device: str
    training: bool

    @property
    def mode(self) -> str:
        sizes = "x".join(map(str, self.shape))
        return f"QRNN fo, window 2, {sizes} {self.dtype}, {PASSES[self.training]}"

    def call(self, *, compiled: bool) -> Callable[[], object]:
        """The layer, as it is or compiled by structfly; in training with the gradients of its input and parameters."""
        torch.manual_seed(0)
        dtype = getattr(torch, self.dtype)
        width = self.shape[2]
        layer = QRNN(width, width, pooling="fo", window=2, device=self.device, dtype=dtype)
        forward = torch.compile(layer, backend="structfly", fullgraph=True, dynamic=False) if compiled else layer
        x = torch.randn(*self.shape, device=self.device, dtype=dtype).requires_grad_()
        upstream = torch.randn_like(x)
        leaves = [x, *layer.parameters()]

        def run() -> Sequence[Tensor]:
            with torch.set_grad_enabled(self.training):
                output, _ = forward(x)
            return torch.autograd.grad(output, leaves, upstream) if self.training else (output,)

        return run

    def product(self) -> Callable[[], object]:
        """The projection of all windows, as if they lay in memory already; in training with both its gradients."""
        dtype = getattr(torch, self.dtype)
        batch, steps, width = self.shape
        windows = torch.randn(batch * steps, 2 * width, device=self.device, dtype=dtype)
        weight = torch.randn(_GATES * width, 2 * width, device=self.device, dtype=dtype)
        out = torch.empty(batch * steps, _GATES * width, device=self.device, dtype=dtype)
        grad_windows, grad_weight = torch.empty_like(windows), torch.empty_like(weight)

        def run() -> None:
            torch.mm(windows, weight.t(), out=out)
            if self.training:
                torch.mm(out, weight, out=grad_windows)
                torch.mm(out.t(), windows, out=grad_weight)

        return run

    def copy(self) -> Callable[[], object]:
        """A copy that moves what the recurrence does: z, f, o and h; backward z, f, o and dh again, and dz, df, do."""
        arrays = _GATES + 1 + (2 * _GATES + 1) * self.training
        batch, steps, width = self.shape
        size = batch * steps * width * getattr(torch, self.dtype).itemsize
        source = torch.ones(arrays * size // 2, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

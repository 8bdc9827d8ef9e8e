"""The loss head under test: cross_entropy(linear(x, w), t), forward and backward, by each provider.

N rows, H features, V classes.  ``python -m benchmarks.head CASE PROVIDER OPTIONS`` prints the peak extra
memory of one step, in bytes: on a CPU that is the whole process's, so each provider needs one of its own.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from structfly import measure

IGNORED = -100
REFERENCE_ROWS = 2048
PROVIDERS = ("eager", "eager-float", "inductor", "structfly")
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem.

    Attributes:
        rows: N.
        features: H.
        classes: V.
        dtype: of x and w, by its torch name.
        device: "cpu" or "cuda".
        logits: "random", or "trained": peaked at frequent classes, as a trained model's (loss about 2 to 3).
        ignored: share of rows whose target is -100.
    """

    rows: int
    features: int
    classes: int
    dtype: str
    device: str
    logits: str
    ignored: float

    @property
    def shape(self) -> str:
        """N, H and V as the command line writes them."""
        return f"{self.rows}x{self.features}x{self.classes}"

    @property
    def gradient_bytes(self) -> int:
        """Size of dx and dw."""
        return (self.rows + self.classes) * self.features * self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


class Inputs(NamedTuple):
    """x [N, H] and w [V, H], which want gradients, and int64 targets t [N]."""

    x: Tensor
    w: Tensor
    t: Tensor


class Truth(NamedTuple):
    """The loss and its gradients dx [N, H] and dw [V, H]."""

    loss: Tensor
    dx: Tensor
    dw: Tensor


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Draw the inputs of a case; the same seed gives the same ones on the same device."""
    n, h, v = case.rows, case.features, case.classes
    generator = torch.Generator(case.device).manual_seed(seed)
    x = torch.randn(n, h, device=case.device, generator=generator)
    w = torch.randn(v, h, device=case.device, generator=generator) / math.sqrt(h)
    if case.logits == "trained":  # frequencies follow Zipf's law, and most rows point at their target's weight
        frequency = 1 / torch.arange(1, v + 1, device=case.device)
        t = torch.multinomial(frequency, n, replacement=True, generator=generator)
        aimed = torch.rand(n, 1, device=case.device, generator=generator) < 0.7
        x = 1.3 * (x + aimed * w[t] * (3.6 * math.sqrt(math.log(v))))
    else:
        t = torch.randint(v, (n,), device=case.device, generator=generator)
    t[torch.rand(n, device=case.device, generator=generator) < case.ignored] = IGNORED
    return Inputs(x.to(case.torch_dtype).requires_grad_(), w.to(case.torch_dtype).requires_grad_(), t)


def truth(inputs: Inputs) -> Truth:
    """The exact answer, rows in chunks: in float64 for float32 inputs, else in float32 without TF32."""
    dtype = torch.float64 if inputs.x.dtype == torch.float32 else torch.float32
    x, w, t = inputs.x.detach().to(dtype), inputs.w.detach().to(dtype), inputs.t
    count = (t != IGNORED).sum()
    loss, dx, dw = (
        torch.zeros((), dtype=torch.float64, device=x.device),
        torch.empty_like(x),
        torch.zeros_like(w),
    )
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        for start in range(0, len(x), REFERENCE_ROWS):
            rows = slice(start, start + REFERENCE_ROWS)
            targets = t[rows].clamp_min(0)[:, None]
            counted = (t[rows] != IGNORED)[:, None]
            log_p = (x[rows] @ w.T).log_softmax(1)
            loss -= log_p.gather(1, targets).masked_fill(~counted, 0).sum(dtype=torch.float64)
            dz = log_p.exp_().scatter_add_(1, targets, -torch.ones_like(targets, dtype=dtype))
            dz *= counted.to(dtype) / count
            dx[rows] = dz @ w
            dw.addmm_(dz.T, x[rows])
    finally:
        torch.set_float32_matmul_precision(precision)
    return Truth(loss / count, dx, dw)


def errors(loss: Tensor, inputs: Inputs, exact: Truth) -> dict[str, float]:
    """Relative Frobenius errors of the loss and of the gradients that a step left, by name."""
    made = Truth(loss, _gradient(inputs.x), _gradient(inputs.w))
    found = {}
    for name, value, reference in zip(Truth._fields, made, exact, strict=True):
        difference = torch.linalg.vector_norm(value.detach().to(reference.dtype) - reference)
        found[name] = float(difference / torch.linalg.vector_norm(reference))
    return found


def _gradient(tensor: Tensor) -> Tensor:
    if tensor.grad is None:
        raise ValueError("the step left no gradient; run its backward first")
    return tensor.grad


def plain_loss(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
    """The definition."""
    return F.cross_entropy(F.linear(x, w), t)


def float_loss(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
    """As model code writes it: the loss of half-precision logits is taken in float32."""
    return F.cross_entropy(F.linear(x, w).float(), t)


def make_loss(provider: str, options: Mapping[str, Any]) -> Loss:
    """The loss by a provider of ``PROVIDERS``; ``options`` are structfly's."""
    if provider == "eager":
        return plain_loss
    if provider == "eager-float":
        return float_loss
    chosen = dict(options) if provider == "structfly" else {}
    return torch.compile(float_loss, backend=provider, options=chosen or None, fullgraph=True, dynamic=False)


def make_step(loss: Loss, inputs: Inputs) -> Callable[[], Tensor]:
    """Forward and backward into fresh gradients; returns the loss."""

    def step() -> Tensor:
        inputs.x.grad = inputs.w.grad = None
        result = loss(*inputs)
        result.backward()
        return result

    return step


def peak_memory(case: Case, provider: str, options: Mapping[str, Any]) -> int:
    """Bytes of one warm step above its inputs, the gradients it leaves included."""
    inputs = make_inputs(case)
    step = make_step(make_loss(provider, options), inputs)

    def step_from_nothing() -> None:
        step()

    step()
    step()
    inputs.x.grad = inputs.w.grad = None
    return measure.peak_extra_memory(step_from_nothing, case.device, warmups=0)


def peak_memory_in_own_process(case: Case, provider: str, options: Mapping[str, Any]) -> int:
    """:func:`peak_memory`, in a fresh process."""
    arguments = [json.dumps(asdict(case)), provider, json.dumps(dict(options))]
    command = [sys.executable, "-m", "benchmarks.head", *arguments]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    print(peak_memory(Case(**json.loads(sys.argv[1])), sys.argv[2], json.loads(sys.argv[3])))

"""The loss head under test: cross_entropy(linear(x, w), t) and other losses, forward and backward, by each provider.

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
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.accuracy import relative_error
from benchmarks.peers import PEERS, Loss
from structfly import measure

IGNORED = -100
REFERENCE_ROWS = 2048
PROVIDERS = ("eager", "eager-float", "inductor", "structfly")
Logits = Callable[..., Tensor]


def _distilled(head: Logits, x: Tensor, w: Tensor, t: Tensor) -> Tensor:
    """The KL divergence from a second head of the same sizes, twice as warm; targets are not read.

    It has the features in another order, so that no compiler finds the two heads' products to be one.
    """
    teacher = head(x.detach().flip(1), w.detach()) / 2.0
    return F.kl_div(F.log_softmax(head(x, w), 1), F.log_softmax(teacher, 1), reduction="batchmean", log_target=True)


def _preferences(rows: Tensor) -> Tensor:
    """Direct preference optimisation (Rafailov et al. 2023) of sequences' losses, against a reference model's of 0.

    The rows are 16 sequences of as many tokens, or 2; the first half of them is preferred to the second, one by one.
    """
    preferred, other = (-rows.view(16 if len(rows) % 16 == 0 else 2, -1).sum(1)).chunk(2)
    return -F.logsigmoid(0.1 * (preferred - other)).mean()


# What is made of the rows' losses (N,), by name.
ROW_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {"preferences": _preferences}
# What is made of x, w, targets and what LEARNED names, by name; ``head`` makes logits, with a bias if it is given one.
LOSSES: dict[str, Callable[..., Tensor]] = {
    "plain": lambda head, x, w, t: F.cross_entropy(head(x, w), t, ignore_index=IGNORED),
    "capped": lambda head, x, w, t: F.cross_entropy(torch.tanh(head(x, w) / 30.0) * 30.0, t, ignore_index=IGNORED),
    "smoothed": lambda head, x, w, t: F.cross_entropy(head(x, w), t, ignore_index=IGNORED, label_smoothing=0.1),
    "biased": lambda head, x, w, t, bias: F.cross_entropy(head(x, w, bias), t, ignore_index=IGNORED),
    "scaled": lambda head, x, w, t, bias, scale: F.cross_entropy(head(x, w, bias) * scale, t, ignore_index=IGNORED),
    "gathered": lambda head, x, w, t: -F.log_softmax(head(x, w), 1).gather(1, t[:, None]).mean(),
    "distilled": _distilled,
    "preferences": lambda head, x, w, t: _preferences(
        F.cross_entropy(head(x, w), t, ignore_index=IGNORED, reduction="none")
    ),
}

# What some of them learn beside x and w: a bias [V], a temperature's inverse [].
LEARNED: dict[str, tuple[str, ...]] = {"biased": ("bias",), "scaled": ("bias", "scale")}
# The gradients' names, of as many as there are.
GRADIENTS = ("dx", "dw", "dbias", "dscale")
# Those that leave no row out.
EVERY_ROW = ("gathered", "distilled")


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
        loss: a key of ``LOSSES``.
        training: forward and backward, or the loss alone, without gradients.
        transposed: whether w is stored (H, V).
        tf32: whether products of float32 may round their operands to TF32.
        graphs: whether compiled steps are CUDA graphs, as with mode="reduce-overhead".
    """

    rows: int
    features: int
    classes: int
    dtype: str
    device: str
    logits: str
    ignored: float
    loss: str = "plain"
    training: bool = True
    transposed: bool = False
    tf32: bool = False
    graphs: bool = False

    def __post_init__(self) -> None:
        if self.tf32 and self.dtype != "float32":
            raise ValueError(f"tf32 is set and dtype is {self.dtype}; it is about products of float32")
        if self.loss in EVERY_ROW and self.ignored:
            raise ValueError(f"ignored is {self.ignored} with the {self.loss} loss, which leaves no row out; use 0")

    @property
    def mode(self) -> str:
        """The conditions in one line."""
        passes = "forward+backward" if self.training else "forward"
        kind = "" if self.loss == "plain" else f"{self.loss}, "
        stored = "weight stored (H, V), " if self.transposed else ""
        dtype = f"{self.dtype} as TF32" if self.tf32 else self.dtype
        graphs = ", as CUDA graphs" if self.graphs else ""
        return f"{self.shape} {dtype} {stored}{self.logits} logits, {kind}{self.ignored:.0%} ignored, {passes}{graphs}"

    @property
    def shape(self) -> str:
        """N, H and V as the command line writes them."""
        return f"{self.rows}x{self.features}x{self.classes}"

    @property
    def gradient_bytes(self) -> int:
        """Size of the gradients, 0 where there are none."""
        numbers = (self.rows + self.classes) * self.features
        numbers += sum({"bias": self.classes, "scale": 1}[name] for name in LEARNED.get(self.loss, ()))
        return self.training * numbers * self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


def precision(*, tf32: bool) -> Literal["high", "highest"]:
    """Of float32 products, as ``torch.set_float32_matmul_precision`` takes it."""
    return "high" if tf32 else "highest"


class Inputs(NamedTuple):
    """x [N, H] and w [V, H], which want gradients, int64 targets t [N], and what ``LEARNED`` names, which does, too."""

    x: Tensor
    w: Tensor
    t: Tensor
    learned: tuple[Tensor, ...] = ()

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """All that want gradients."""
        return (self.x, self.w, *self.learned)


class Truth(NamedTuple):
    """The loss and its gradients, of ``Inputs.leaves``."""

    loss: Tensor
    gradients: tuple[Tensor, ...]


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
    x, w = x.to(case.torch_dtype), w.to(case.torch_dtype)
    w = w.t().contiguous().t() if case.transposed else w
    learned = {
        "bias": torch.randn(v, device=case.device, generator=generator) / 4,
        "scale": torch.tensor(0.75).to(w.device),
    }
    names = LEARNED.get(case.loss, ())
    return Inputs(
        x.requires_grad_(),
        w.requires_grad_(),
        t,
        tuple(learned[name].to(case.torch_dtype).requires_grad_() for name in names),
    )


def truth(inputs: Inputs, loss: str = "plain") -> Truth:
    """The exact answer, rows in chunks: in float64 for float32 inputs, else in float32 without TF32."""
    dtype = torch.float64 if inputs.x.dtype == torch.float32 else torch.float32
    x, w, *learned = (tensor.detach().to(dtype).requires_grad_() for tensor in inputs.leaves)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision(tf32=False))
    try:
        total = _of_rows(x, w, inputs.t, loss) if loss in ROW_LOSSES else _mean(x, w, inputs.t, loss, *learned)
    finally:
        torch.set_float32_matmul_precision(before)
    return Truth(total, tuple(map(_gradient, (x, w, *learned))))


def _of_rows(x: Tensor, w: Tensor, t: Tensor, loss: str) -> Tensor:
    """A loss of ``ROW_LOSSES``, and its gradients in the leaves: what each row's loss weighs, then the rows."""

    def chunk(start: int) -> Tensor:
        part = slice(start, start + REFERENCE_ROWS)
        return F.cross_entropy(F.linear(x[part], w), t[part], ignore_index=IGNORED, reduction="none")

    starts = range(0, len(x), REFERENCE_ROWS)
    with torch.no_grad():
        rows = torch.cat([chunk(start) for start in starts]).double()
    value = ROW_LOSSES[loss](rows.requires_grad_())
    (weights,) = torch.autograd.grad(value, rows)
    for start in starts:
        chunk(start).backward(weights[start : start + REFERENCE_ROWS].to(x.dtype))
    return value.detach()


def _mean(x: Tensor, w: Tensor, t: Tensor, loss: str, *learned: Tensor) -> Tensor:
    """A loss that is a mean over rows, and its gradients in the leaves."""
    count = (t != IGNORED).sum()
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for start in range(0, len(x), REFERENCE_ROWS):
        part = t[start : start + REFERENCE_ROWS]
        counted = (part != IGNORED).sum()
        if counted:
            mean = LOSSES[loss](F.linear, x[start : start + REFERENCE_ROWS], w, part, *learned)
            (mean * (counted.double() / count).to(x.dtype)).backward()
            total += mean.detach().double() * counted
    return total / count


def errors(loss: Tensor, inputs: Inputs, exact: Truth) -> dict[str, float]:
    """Relative Frobenius errors of the loss and, of a training step, of the gradients that it left, by name."""
    found = {"loss": relative_error(loss, exact.loss)}
    if loss.requires_grad:
        pairs = zip(GRADIENTS, inputs.leaves, exact.gradients, strict=False)
        found |= {name: relative_error(_gradient(leaf), gradient) for name, leaf, gradient in pairs}
    return found


def _gradient(tensor: Tensor) -> Tensor:
    if tensor.grad is None:
        raise ValueError("the step left no gradient; run its backward first")
    return tensor.grad


def make_loss(provider: str, options: Mapping[str, Any], case: Case) -> Loss:
    """The loss of a case by a provider: one of ``PROVIDERS``, of :mod:`benchmarks.peers`, or "structfly@SIZE".

    Args:
        options: structfly's.
        case: of the plain loss for a peer.
    """
    loss, made = case.loss, LOSSES[case.loss]

    def definition(x: Tensor, w: Tensor, t: Tensor, *learned: Tensor) -> Tensor:
        return made(F.linear, x, w, t, *learned)

    def as_models_write_it(x: Tensor, w: Tensor, t: Tensor, *learned: Tensor) -> Tensor:
        return made(lambda x, w, bias=None: F.linear(x, w, bias).float(), x, w, t, *learned)

    if provider == "eager":
        return definition
    if provider == "eager-float":
        return as_models_write_it
    if provider in PEERS:
        if loss != "plain":
            raise ValueError(f"{provider} is measured with the plain loss only, not {loss!r}")
        return PEERS[provider](as_models_write_it)
    backend, _, memory = provider.partition("@")
    chosen = dict(options) if backend == "structfly" else {}
    if case.graphs:
        chosen |= {"mode": "reduce-overhead"} if backend == "structfly" else {"triton.cudagraphs": True}
    if memory:
        chosen["budget"] = {**chosen.get("budget", {}), "loss_memory": memory}
    return torch.compile(as_models_write_it, backend=backend, options=chosen or None, fullgraph=True, dynamic=False)


def make_step(loss: Loss, inputs: Inputs, *, training: bool = True) -> Callable[[], Tensor]:
    """Forward and backward into fresh gradients, or forward alone; returns the loss."""

    def train() -> Tensor:
        for leaf in inputs.leaves:
            leaf.grad = None
        result = loss(inputs.x, inputs.w, inputs.t, *inputs.learned)
        result.backward()
        return result

    def evaluate() -> Tensor:
        with torch.no_grad():
            return loss(inputs.x, inputs.w, inputs.t, *inputs.learned)

    return train if training else evaluate


def peak_memory(case: Case, provider: str, options: Mapping[str, Any]) -> int:
    """Bytes of one warm step above its inputs, the gradients it leaves included."""
    torch.set_float32_matmul_precision(precision(tf32=case.tf32))
    inputs = make_inputs(case)
    step = make_step(make_loss(provider, options, case), inputs, training=case.training)

    def step_from_nothing() -> None:
        step()

    step()
    step()
    for leaf in inputs.leaves:
        leaf.grad = None
    return measure.peak_extra_memory(step_from_nothing, case.device, warmups=0)


def peak_memory_in_own_process(case: Case, provider: str, options: Mapping[str, Any]) -> int:
    """:func:`peak_memory`, in a fresh process."""
    arguments = [json.dumps(asdict(case)), provider, json.dumps(dict(options))]
    command = [sys.executable, "-m", "benchmarks.head", *arguments]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    print(peak_memory(Case(**json.loads(sys.argv[1])), sys.argv[2], json.loads(sys.argv[3])))

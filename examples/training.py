"""One training run of the demo's GPT, in a process of its own so that its memory is its own.

``python -m examples.training FOLDER`` reads ``FOLDER/spec.json``, takes one training step for each line on its
standard input, and at the end of that writes ``FOLDER/result.json`` and ``FOLDER/first_step.safetensors``: the first
step's loss and gradients, before any update.  :mod:`examples.workers` is the other side.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from examples.gpt import GPT, GPTConfig
from structfly import measure

Variant = Literal["plain", "perturbed", "float64"]


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """What one run does; JSON on disk.

    Attributes:
        backend: "eager", or a backend of ``torch.compile``.
        options: options of that backend.
        variant: "plain"; "perturbed" moves every initial parameter by one rounding, up or down at random;
            "float64" computes in that precision.
        device: "cpu" (float32) or "cuda" (bfloat16 autocast).
        tokens: path of the token array (``.npy``).
        end_of_text: id of the token that separates documents.
        batch: sequences a step.
        steps: how many; 0 computes the first loss and its gradients only.
        seed: of the initial weights, the batches and the perturbation.
        learning_rate: AdamW's.
        model: sizes of the GPT.
    """

    backend: str
    variant: Variant
    device: str
    tokens: str
    end_of_text: int
    batch: int
    steps: int
    seed: int
    learning_rate: float
    model: GPTConfig
    options: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> RunSpec:
        """Read what :meth:`save` wrote."""
        values = json.loads(path.read_text())
        return cls(**{**values, "model": GPTConfig(**values["model"])})


@dataclass(kw_only=True)
class RunResult:
    """What one run measured; JSON on disk.

    Attributes:
        losses: of every step.
        seconds: of every step, from zeroing the gradients to the updated weights; the first ones compile.
        peak_bytes: extra memory of one training step after the others.
        report: structfly's report, or "".
        environment: see :func:`structfly.measure.environment`.
    """

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    report: str = ""
    environment: dict[str, str] = field(default_factory=dict)


def compute_dtype(device: str) -> torch.dtype:
    """The dtype whose rounding the checks reckon with."""
    return torch.bfloat16 if device == "cuda" else torch.float32


def unit_roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of rounding once to ``dtype``."""
    return torch.finfo(dtype).eps / 2


def perturb(model: torch.nn.Module, unit: float, seed: int) -> None:
    """Multiply every parameter by ``1 + unit`` or ``1 - unit``, at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            signs = torch.randint(0, 2, parameter.shape, generator=generator).double() * 2 - 1
            parameter.copy_(parameter.double() * (1 + unit * signs.to(parameter.device)))


def draw_batch(tokens: Tensor, end_of_text: int, spec: RunSpec, step: int) -> tuple[Tensor, Tensor]:
    """Random windows of the corpus and their labels, both [batch, context] int64.

    The first token of a document cannot be told from the one before, so its label is -100: not counted.
    """
    generator = torch.Generator().manual_seed(spec.seed * 1_000_003 + step)
    starts = torch.randint(0, len(tokens) - spec.model.context, (spec.batch, 1), generator=generator)
    x = tokens[starts + torch.arange(spec.model.context)].long()
    labels = x.clone()
    labels[:, 1:].masked_fill_(x[:, :-1] == end_of_text, -100)
    return x.to(spec.device), labels.to(spec.device)


def train(spec: RunSpec, folder: Path, turns: Iterable[object]) -> RunResult:
    """Write the first step's loss and gradients to ``folder``, then take a step at each of ``turns``."""
    torch.manual_seed(spec.seed)
    dtype = compute_dtype(spec.device)
    model = GPT(spec.model)
    if spec.variant == "perturbed":
        perturb(model, unit_roundoff(dtype), spec.seed)
    if spec.variant == "float64":
        model.double()
    model.to(spec.device)
    mixed = spec.device == "cuda" and spec.variant != "float64"

    def loss_of(x: Tensor, y: Tensor, reduction: Literal["mean", "none"] = "mean") -> Tensor:
        with torch.autocast(spec.device, dtype) if mixed else contextlib.nullcontext():
            return model.loss(x, y, reduction=reduction)

    def step(x: Tensor, y: Tensor) -> Tensor:
        return loss_of(x, y)

    if spec.backend == "eager":
        compiled = step
    else:
        compiled = torch.compile(step, backend=spec.backend, options=spec.options or None, dynamic=False)

    tokens = torch.from_numpy(np.load(spec.tokens, allow_pickle=False))
    x, y = draw_batch(tokens, spec.end_of_text, spec, 0)
    loss = compiled(x, y)
    loss.backward()
    first = {f"gradient.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    first["loss"] = loss.detach()
    if spec.backend == "eager":
        with torch.no_grad():
            first["token_losses"] = loss_of(x, y, "none")
    save_file({name: value.cpu().contiguous() for name, value in first.items()}, folder / "first_step.safetensors")
    del first, loss
    result = RunResult(environment=measure.environment(spec.device))
    if spec.steps == 0:
        return result

    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.learning_rate, fused=True)

    def training_step(x: Tensor, y: Tensor) -> float:
        optimizer.zero_grad()
        loss = compiled(x, y)
        loss.backward()
        optimizer.step()
        return loss.item()

    for number, _ in enumerate(turns):
        x, y = draw_batch(tokens, spec.end_of_text, spec, number)
        start = time.perf_counter()
        result.losses.append(training_step(x, y))
        result.seconds.append(time.perf_counter() - start)
    optimizer.zero_grad()
    result.peak_bytes = measure.peak_extra_memory(lambda: training_step(x, y), spec.device, warmups=0)
    if spec.backend == "structfly":
        import structfly

        result.report = str(structfly.explain(step, options=spec.options)(x, y))
    return result


def turns() -> Iterator[None]:
    """A turn for each line of the standard input; a line of the standard output says that it is over."""
    print("ready", flush=True)
    for _ in sys.stdin:
        yield
        print("done", flush=True)


def main() -> None:
    """Entry point of the worker process."""
    folder = Path(sys.argv[1])
    result = train(RunSpec.load(folder / "spec.json"), folder, turns())
    (folder / "result.json").write_text(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()

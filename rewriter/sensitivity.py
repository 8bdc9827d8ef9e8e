"""What calibration data says of a model's linear layers, in one streaming forward and backward over it.

With x a layer's input and g the gradient of the summed losses of a batch with respect to its output, token by token,
the sums of x x^T and of g g^T over all tokens that the loss depends on make the K-FAC terms of
:class:`~structfly.records.layer.LayerStatistics` (Martens and Grosse 2015).  No gradient of a weight is made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from structfly.errors import ArgumentError
from structfly.records.layer import LayerStatistics
from structfly.rewriter.evaluating import evaluating, sampling

Losses = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> the losses (n,) of a batch's independent terms, or their mean ()."""

_SAVE_SECONDS = 30.0
_KINDS = ("mean", "inputs", "gradients")


@dataclass(frozen=True)
class Watched:
    """A layer whose statistics are wanted.

    Attributes:
        module: the layer.
        in_features, out_features: its sizes.
        rows: its input or output as (tokens, features).
        biased: whether it has a bias, which can take up the mean of a change.
    """

    module: nn.Module
    in_features: int
    out_features: int
    rows: Callable[[Tensor], Tensor]
    biased: bool


class _Sums:
    """Of one layer: sum x, sum x x^T, sum g g^T, in float32 on the layer's device, and how many tokens."""

    def __init__(self, layer: Watched) -> None:
        device = next(layer.module.parameters()).device
        self.biased = layer.biased
        self.mean = torch.zeros(layer.in_features, device=device)
        self.inputs = torch.zeros(layer.in_features, layer.in_features, device=device)
        self.gradients = torch.zeros(layer.out_features, layer.out_features, device=device)
        self.tokens = 0

    def add(self, x: Tensor, g: Tensor) -> None:
        counts = g.abs().amax(1) > 0  # padding does not
        x, g = x.float() * counts[:, None], g.float()
        self.mean += x.sum(0)
        self.inputs.addmm_(x.t(), x)
        self.gradients.addmm_(g.t(), g)
        self.tokens += int(counts.sum())

    def statistics(self, terms: int) -> LayerStatistics:
        """What they say of a loss that is the mean of ``terms`` terms."""
        inputs, mean = self.inputs / self.tokens, self.mean / self.tokens
        if self.biased:
            inputs -= mean[:, None] * mean
        return LayerStatistics(inputs, self.gradients / terms, mean if self.biased else None, self.tokens)


def measure_statistics(
    model: nn.Module,
    layers: Mapping[str, Watched],
    batches: Iterable[Any],
    losses: Losses,
    *,
    seed: int = 0,
    progress: bool = True,
    resume: Path | None = None,
) -> dict[str, LayerStatistics]:
    """The statistics of ``layers``, those that no loss depends on left out.

    Args:
        model: run in evaluation mode; left as it was.
        layers: by name.
        batches: calibration data, whatever ``losses`` takes.
        losses: called once a batch.  Of a scalar, the loss's scale is not known and only the layers' proportions are
            right.
        seed: labels that ``losses`` samples are the same for the same batch number.
        progress: whether a bar is shown.
        resume: a file in which the sums so far are kept and from which they are taken up again.

    Raises:
        ArgumentError: there are no batches, a loss does not depend on the layers, or the file is of another model.
    """
    sums, done, terms = {name: _Sums(layer) for name, layer in layers.items()}, 0, 0
    if resume is not None and resume.exists():
        done, terms = _load(resume, sums)
    saved = time.monotonic()
    with evaluating(model), _watching(layers, sums), Progress(disable=not progress) as bar:
        total = len(batches) if isinstance(batches, Sized) else None
        task = bar.add_task("sensitivity", total=total, completed=done)
        for number, batch in enumerate(batches):
            if number < done:
                continue
            terms += _backward(model, batch, losses, seed + number)
            done = number + 1
            bar.advance(task)
            if resume is not None and time.monotonic() - saved > _SAVE_SECONDS:
                _save(resume, sums, done, terms)
                saved = time.monotonic()
    if not done:
        raise ArgumentError("calibration has no batches; give at least one")
    if resume is not None:
        _save(resume, sums, done, terms)
    return {name: each.statistics(terms) for name, each in sums.items() if each.tokens}


def _backward(model: nn.Module, batch: Any, losses: Losses, seed: int) -> int:
    """One batch; returns how many terms its loss has."""
    with sampling(model, seed), torch.enable_grad():
        found = losses(model, batch)
        if not found.requires_grad:
            raise ArgumentError("the calibration loss does not depend on any of the layers; return it undetached")
        found.sum().backward()
    return max(found.numel(), 1)


@contextmanager
def _watching(layers: Mapping[str, Watched], sums: Mapping[str, _Sums]) -> Iterator[None]:
    def watch(name: str, layer: Watched) -> Callable[..., Tensor]:
        def after(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
            if not output.requires_grad:  # nothing before it does
                output.requires_grad_()
            x = layer.rows(arguments[0].detach())
            output.register_hook(lambda g: sums[name].add(x, layer.rows(g)))
            return output

        return after

    handles = [layer.module.register_forward_hook(watch(name, layer)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _save(path: Path, sums: Mapping[str, _Sums], done: int, terms: int) -> None:
    from safetensors.torch import save_file

    tensors = {f"{name}.{kind}": getattr(each, kind) for name, each in sums.items() for kind in _KINDS}
    tensors |= {f"{name}.tokens": torch.tensor(each.tokens) for name, each in sums.items()}
    partial = path.with_name(path.name + ".partial")
    progress = {"done": str(done), "terms": str(terms)}
    save_file({name: tensor.cpu() for name, tensor in tensors.items()}, partial, progress)
    partial.replace(path)


def _load(path: Path, sums: Mapping[str, _Sums]) -> tuple[int, int]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
        metadata = file.metadata()
    shapes = {name: each.inputs.shape for name, each in sums.items()}
    found = {name.removesuffix(".inputs"): t.shape for name, t in kept.items() if name.endswith(".inputs")}
    if shapes != found:
        raise ArgumentError(f"{path} holds the statistics of other layers; delete it, or name another file")
    for name, each in sums.items():
        for kind in _KINDS:
            getattr(each, kind).copy_(kept[f"{name}.{kind}"])
        each.tokens = int(kept[f"{name}.tokens"])
    return int(metadata["done"]), int(metadata["terms"])

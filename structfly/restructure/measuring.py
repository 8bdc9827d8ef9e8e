"""The loss of a model on calibration data, before and after its layers were replaced."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from structfly.restructure.distillation import Distillation
from structfly.rewriter.evaluating import evaluating, sampling
from structfly.rewriter.sensitivity import Losses


class Loss:
    """The mean of ``loss_fn`` over all batches; a distillation's is that of its distance from the model as it is now.

    Args:
        model: the dense model.
        batches: a collection that can be gone through again.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any], loss_fn: Losses, seed: int) -> None:
        self._batches, self._loss_fn, self._seed = batches, loss_fn, seed
        self._references: list[Tensor] = []
        if isinstance(loss_fn, Distillation):
            with evaluating(model):
                self._references = [loss_fn.reference(model, batch) for batch in batches]

    @torch.no_grad()
    def of(self, model: nn.Module) -> float:
        """The loss of ``model``, in evaluation mode."""
        total, count = 0.0, 0
        with evaluating(model):
            for number, batch in enumerate(self._batches):
                if isinstance(self._loss_fn, Distillation):
                    found = self._loss_fn.distance(model, batch, self._references[number])
                else:
                    with sampling(model, self._seed + number):
                        found = self._loss_fn(model, batch)
                total, count = total + float(found.double().sum()), count + found.numel()
        return total / max(count, 1)

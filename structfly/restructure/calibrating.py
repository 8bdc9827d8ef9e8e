"""What calibration data say before anything is chosen: of which layers, how much a change costs, and the loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from structfly.records.layer import NO_STATISTICS, LayerStatistics
from structfly.restructure.layers import Layer
from structfly.restructure.measuring import Loss
from structfly.restructure.reads import read_elsewhere
from structfly.rewriter.sensitivity import Losses, Watched, measure_statistics

_TOKENS = 4096  # of a forward pass, where no data say how many it has


@dataclass(frozen=True)
class Calibration:
    """What is known of the layers.

    Attributes:
        layers: those that may be restructured, by name.
        left: the others, and why.
        statistics: of each of ``layers``.
        tokens: of a forward pass.
        loss: measures the loss on the data, None without data.
    """

    layers: Mapping[str, Layer]
    left: Mapping[str, str]
    statistics: Mapping[str, LayerStatistics]
    tokens: int = _TOKENS
    loss: Loss | None = None

    @classmethod
    def without_data(cls, layers: Mapping[str, Layer], left: Mapping[str, str]) -> Calibration:
        """Where the weights alone decide."""
        return cls(layers, left, dict.fromkeys(layers, NO_STATISTICS))

    @classmethod
    def of(
        cls,
        model: nn.Module,
        layers: Mapping[str, Layer],
        left: Mapping[str, str],
        batches: Iterable[Any],
        loss_fn: Losses,
        *,
        sensitivity: Literal["fisher", "inputs"],
        seed: int,
        progress: bool,
        resume: Path | None,
    ) -> Calibration:
        """From data; arguments as of :func:`~structfly.restructure.restructuring.restructure_`."""
        batches = list(batches)
        elsewhere = read_elsewhere(model, layers, lambda: [loss_fn(model, batch) for batch in batches[:1]])
        left = {**left, **dict.fromkeys(elsewhere, "its weight is read by something else than the layer")}
        watched = {
            name: Watched(layer.module, *layer.sizes, layer.rows, layer.bias is not None)
            for name, layer in layers.items()
            if name not in elsewhere
        }
        statistics = measure_statistics(model, watched, batches, loss_fn, seed=seed, progress=progress, resume=resume)
        if sensitivity == "inputs":
            statistics = {name: replace(each, output_fisher=None) for name, each in statistics.items()}
        left |= {name: "no calibration loss depends on it" for name in watched if name not in statistics}
        seen = max((each.tokens for each in statistics.values()), default=0)
        return cls(
            {name: layers[name] for name in statistics},
            left,
            statistics,
            max(1, seen // len(batches)),
            Loss(model, batches, loss_fn, seed),
        )

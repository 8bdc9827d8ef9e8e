"""Times of layers that nobody measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from structfly.layer_times import store
from structfly.layer_times.store import Key, Origin, Precision, TimedLayer, origin_on
from structfly.layer_times.timing import Taken
from structfly.lowering.device_profile import device_profile
from structfly.patterns.structure import Structure
from structfly.records.layer import LayerSizes, Passes, Shape
from structfly.rewriter.layer_costs import Conditions, dense_cost

CPU = torch.device("cpu")
CONDITIONS = Conditions(4096, device_profile(CPU))
SMALL, LARGE = (Shape(LayerSizes(*sizes), torch.float32) for sizes in ((128, 192), (256, 256)))
HERE = origin_on(CPU)


def predicted(structure: Structure | None, shape: Shape) -> float:
    """Seconds by the roofline under ``CONDITIONS``."""
    sizes, dtype = shape
    cost = dense_cost(sizes, dtype) if structure is None else structure.cost(sizes, dtype)
    return CONDITIONS.amounts(cost)["time"]


def entry(
    sizes: LayerSizes,
    tokens: int,
    relative: Mapping[Any, float],
    *,
    dense: float = 1.0,
    origin: Origin = HERE,
    precision: Precision = "float32",
    passes: Passes = "forward",
) -> TimedLayer:
    """An entry of a file."""
    return TimedLayer.of(origin, Key(sizes, precision, passes, tokens), dense, dict(relative))


def keep(*entries: TimedLayer) -> None:
    """Make these all that the user's file holds."""
    store.user_path().unlink(missing_ok=True)
    store.add_times(store.user_path(), entries)


class Slow:
    """A device on which each structure takes so many times as long as the dense layer, and by its setting more.

    Attributes:
        calls: what it has timed.
    """

    def __init__(self, slowness: Mapping[str, float]) -> None:
        self.slowness = slowness
        self.calls: list[tuple[Structure | None, Shape, int, Passes]] = []

    def __call__(
        self, structure: Structure | nn.Module | None, shape: Shape, tokens: int, device: torch.device, passes: Passes
    ) -> Taken:
        if isinstance(structure, nn.Module):
            return Taken(self.slowness["merged"], 1.0)
        self.calls.append((structure, shape, tokens, passes))
        if structure is None:
            return Taken(1.0, 1.0)
        return Taken(self.slowness[structure.name] * (1 + structure.cost(*shape).at(tokens)["parameters"] / 1e6), 1.0)

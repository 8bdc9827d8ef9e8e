"""How long layers take on the model's device: the dense one and a few settings of each structure, for every shape."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from rich.progress import Progress
from torch import nn

from structfly import measure
from structfly.patterns.structure import Structure, StructuredLinear
from structfly.records.layer import LayerSizes
from structfly.rewriter.layer_costs import Conditions, dense_cost

_RANKS = ((0.5,), (0.0, 1.0), (0.25, 0.75))  # of the settings that are timed, in order of predicted time; by round
_SAMPLE_SECONDS = 0.05  # of the rounds of one measurement, within these numbers
_FEWEST, _MOST = 3, 50
_LONG = 1.0  # seconds: one round that takes longer is enough


class Shape(NamedTuple):
    """Layers of one shape take equally long."""

    sizes: LayerSizes
    dtype: torch.dtype


@dataclass(frozen=True)
class LayerTime:
    """One measurement.

    Attributes:
        structure: of the layer, None for the dense one.
        sizes: of the layer.
        dtype: of its weights and inputs.
        tokens: rows of its input.
        device: its name.
        predicted: seconds of a forward pass by the roofline.
        seconds: of a forward pass, measured; of structures relative to the dense layer, so that what else the device
            did meanwhile, or how hot it was, is no part of it.
    """

    structure: Structure | None
    sizes: LayerSizes
    dtype: torch.dtype
    tokens: int
    device: str
    predicted: float
    seconds: float


class Taken(NamedTuple):
    """Seconds of a layer's forward pass, and of the dense layer's of its shape in the same rounds."""

    layer: float
    dense: float


Timer = Callable[[Structure | None, Shape, int, torch.device], Taken]
"""Times a layer of a structure, None for the dense one, of a shape, over so many tokens, on a device."""


@torch.no_grad()
def layer_seconds(structure: Structure | None, shape: Shape, tokens: int, device: torch.device) -> Taken:
    """Median times of warm calls, eager and without gradients, without the bias that all have alike."""
    sizes, dtype = shape
    layers: dict[str, nn.Module] = {"dense": nn.Linear(*sizes, bias=False, device=device, dtype=dtype)}
    if structure is not None:
        layers["layer"] = StructuredLinear(structure, *sizes, bias=False, device=device, dtype=dtype)
    x = torch.randn(tokens, sizes.in_features, device=device, dtype=dtype)
    calls = {name: partial(layer, x) for name, layer in layers.items()}
    found = measure.times_in_rotation(calls, device, repeats=1, warmups=1)
    once = sum(each.median for each in found.values())
    if once < _LONG:
        repeats = min(max(round(_SAMPLE_SECONDS / once), _FEWEST), _MOST)
        found = measure.times_in_rotation(calls, device, repeats=repeats, warmups=0)
    dense = found["dense"].median
    return Taken(found["layer"].median if "layer" in found else dense, dense)


def measured_times(
    offered: Mapping[Shape, Sequence[type[Structure]]],
    conditions: Conditions,
    device: torch.device,
    *,
    seconds: float,
    progress: bool = True,
    timer: Timer = layer_seconds,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[LayerTime, ...]:
    """Time layers of each shape: the dense one first, then of each structure the setting in the middle of its menu by
    predicted time, the least and the largest, and the two between.  Structures are timed in turns with the dense layer.

    Args:
        offered: shapes, each with the structures offered there.
        seconds: no measurement begins when so many have passed.
    """
    wanted, ends = list(_in_order(offered, conditions)), clock() + seconds
    found: list[LayerTime] = []
    dense: dict[Shape, float] = {}
    devices = [device] if device.type == "cuda" else []
    with Progress(disable=not progress) as bar, torch.random.fork_rng(devices):
        for shape, structure, predicted in bar.track(wanted, description="times"):
            if clock() >= ends:
                break
            taken = timer(structure, shape, conditions.tokens, device)
            at_first = dense.setdefault(shape, taken.dense)
            scaled = taken.layer * (at_first / taken.dense)
            found.append(LayerTime(structure, *shape, conditions.tokens, conditions.profile.name, predicted, scaled))
    return tuple(found)


def _in_order(
    offered: Mapping[Shape, Sequence[type[Structure]]], conditions: Conditions
) -> Iterator[tuple[Shape, Structure | None, float]]:
    """What is timed, with what is predicted of it: of what is most wanted first, for all shapes."""
    for shape in offered:
        yield shape, None, conditions.amounts(dense_cost(*shape))["time"]
    menus = []
    for (sizes, dtype), structures in offered.items():
        for structure in structures:
            menu = [each for each in structure.menu(sizes) if not each.why_not(sizes)]
            times = [conditions.amounts(each.cost(sizes, dtype))["time"] for each in menu]
            ranked = sorted(zip(times, menu, strict=True), key=lambda pair: pair[0])
            menus.append((Shape(sizes, dtype), ranked, set[int]()))
    for ranks in _RANKS:
        for shape, ranked, taken in menus:
            for rank in ranks:
                pick = round(rank * (len(ranked) - 1))
                if ranked and pick not in taken:
                    taken.add(pick)
                    yield shape, ranked[pick][1], ranked[pick][0]

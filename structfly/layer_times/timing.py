"""One measurement: how long a layer takes on a device, beside the dense one."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from structfly import measure
from structfly.patterns.structure import Structure, StructuredLinear
from structfly.records.layer import LayerSizes, Passes, Shape

_SAMPLE_SECONDS = 0.05  # of the rounds of one measurement, within these numbers
_FEWEST, _MOST = 3, 50
_LONG = 1.0  # seconds: one round that takes longer is enough


class Taken(NamedTuple):
    """Seconds that a layer takes, and the dense layer of its shape in the same rounds."""

    layer: float
    dense: float


Timer = Callable[[Structure | nn.Module | None, Shape, int, torch.device, Passes], Taken]
"""Times a layer, a structure's or the dense one for None, of a shape, over so many tokens, on a device."""


def layer_seconds(
    what: Structure | nn.Module | None, shape: Shape, tokens: int, device: torch.device, passes: Passes
) -> Taken:
    """Median times of warm calls, eager, without the bias that all have alike.  No mode that the caller stands in, and
    no random number that it draws, is touched."""
    sizes, dtype = shape
    training = passes == "training"
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.inference_mode(False),
        torch.autocast(device.type, enabled=False),
        torch.set_grad_enabled(training),
    ):
        dense = nn.Linear(*sizes, bias=False, device="meta", dtype=dtype).to_empty(device=device)
        nn.init.normal_(dense.weight, std=sizes.in_features**-0.5)
        layers: dict[str, nn.Module] = {"dense": dense}
        if isinstance(what, Structure):
            layers["layer"] = _structured(what, shape, device)
        elif what is not None:
            layers["layer"] = what
        x = torch.randn(tokens, sizes.in_features, device=device, dtype=dtype, requires_grad=training)
        gradient = torch.randn(tokens, sizes.out_features, device=device, dtype=dtype) if training else None
        calls = {
            name: partial(layer, x) if gradient is None else partial(_step, layer, x, gradient)
            for name, layer in layers.items()
        }
        found = measure.times_in_rotation(calls, device, repeats=1, warmups=1)
        once = sum(each.median for each in found.values())
        if once < _LONG:
            repeats = min(max(round(_SAMPLE_SECONDS / once), _FEWEST), _MOST)
            found = measure.times_in_rotation(calls, device, repeats=repeats, warmups=0)
    seconds = {name: each.median for name, each in found.items()}
    return Taken(seconds.get("layer", seconds["dense"]), seconds["dense"])


def _step(layer: nn.Module, x: Tensor, gradient: Tensor) -> None:
    layer.zero_grad(set_to_none=True)
    x.grad = None
    layer(x).backward(gradient)


def _structured(structure: Structure, shape: Shape, device: torch.device) -> StructuredLinear:
    """A layer with what is learned drawn on its device, for :meth:`Structure.initial` draws on the CPU."""
    sizes, dtype = shape
    layer = StructuredLinear(structure, *sizes, bias=False, device="meta", dtype=dtype).to_empty(device=device)
    with torch.no_grad():
        for name, factor in layer.factors.items():
            if factor.is_floating_point():
                factor.normal_(std=sizes.in_features**-0.5)
            else:
                factor.copy_(_positions(structure, sizes)[name])
    return layer


@lru_cache(maxsize=256)
def _positions(structure: Structure, sizes: LayerSizes) -> dict[str, Tensor]:
    """The factors that say where others stand, which depend on nothing that a measurement changes."""
    return {name: each for name, each in structure.initial(sizes).items() if not each.is_floating_point()}

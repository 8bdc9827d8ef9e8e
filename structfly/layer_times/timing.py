"""One measurement: how long a layer takes on a device, beside the dense one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from structfly import measure
from structfly.patterns.structure import Structure, StructuredLinear
from structfly.records.layer import Passes, Shape

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
        layers: dict[str, nn.Module] = {"dense": nn.Linear(*sizes, bias=False, device=device, dtype=dtype)}
        if isinstance(what, Structure):
            layers["layer"] = StructuredLinear(what, *sizes, bias=False, device=device, dtype=dtype)
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
    dense = found["dense"].median
    return Taken(found["layer"].median if "layer" in found else dense, dense)


def _step(layer: nn.Module, x: Tensor, gradient: Tensor) -> None:
    layer.zero_grad(set_to_none=True)
    x.grad = None
    layer(x).backward(gradient)

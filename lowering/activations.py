"""The activations that a product applies to its float32 sums, before they are rounded: names, and each by torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from structfly.errors import ArgumentError

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
"""By name; ``templates/activations.jinja`` has the same."""


def activated(y: Tensor, activation: str) -> Tensor:
    """The activation of that name, or none for "", of a tensor of any shape.

    Raises:
        ArgumentError: there is no such activation.
    """
    if not activation:
        return y
    if activation not in ACTIVATIONS:
        raise ArgumentError(f"activation is {activation!r}; it must be one of {', '.join(ACTIVATIONS)}, or '' for none")
    return ACTIVATIONS[activation](y)

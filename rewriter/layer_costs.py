"""What layers cost: one layer's amounts of each resource, and what several use together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from structfly.records import Cost, DeviceProfile
from structfly.records.layer import TOKENS, LayerCost, LayerSizes, Passes, product
from structfly.rewriter.roofline import evaluate

Costs = Mapping[str, float]
"""Amounts by name: params, flops, weight_bytes, saved_bytes, transient_bytes, and time in seconds."""

ACTIVATIONS = "activation_bytes"
"""The resource that is what all layers keep for backward and the most that one takes besides."""


@dataclass(frozen=True)
class Conditions:
    """Under what costs hold: tokens of a forward pass, the device, and what the time is of."""

    tokens: int
    profile: DeviceProfile
    passes: Passes = "forward"

    def amounts(self, cost: LayerCost) -> dict[str, float]:
        """The amounts of each resource.

        Of a forward product y = x W^T, backward makes dx = dy W and dW = dy^T x, each of as many operations and bytes,
        so that training takes three times as long.
        """
        amounts = dict(cost.at(self.tokens))
        amounts["params"] = amounts.pop("parameters")
        forward = evaluate(Cost(cost.stages), {TOKENS: self.tokens}, self.profile).seconds
        amounts["time"] = 3 * forward if self.passes == "training" else forward
        return amounts


def dense_cost(sizes: LayerSizes, dtype: torch.dtype) -> LayerCost:
    """What the dense layer costs."""
    return LayerCost(
        parameters=sizes.parameters,
        flops=2 * TOKENS * sizes.parameters,
        weight_bytes=sizes.parameters * dtype.itemsize,
        saved_bytes=0,
        transient_bytes=0,
        stages=(product(sizes.in_features, sizes.out_features, dtype),),
    )


def added(costs: Costs, resource: str) -> float:
    """What one layer adds to the use of a resource."""
    return costs["saved_bytes" if resource == ACTIVATIONS else resource]


def used(layers: Iterable[Costs], resource: str) -> float:
    """What layers use of a resource together."""
    layers = list(layers)
    peak = max((costs["transient_bytes"] for costs in layers), default=0.0) if resource == ACTIVATIONS else 0.0
    return sum(added(costs, resource) for costs in layers) + peak


def keeps(layers: Iterable[Costs], limits: Mapping[str, float]) -> bool:
    """Whether layers keep all limits, up to what adding up rounds."""
    layers = list(layers)
    return all(used(layers, resource) <= limit * (1 + 1e-12) for resource, limit in limits.items())

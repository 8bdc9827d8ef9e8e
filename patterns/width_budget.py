"""Budgeted shrinking: widths of masks are made smaller while a model costs more than it may."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from structfly.errors import ArgumentError
from structfly.patterns.gblr_learned import GaudiGBLR

_HALVINGS = 40  # of the step, when a whole one would take more than the target asks for


class WidthBudget:
    """Takes a proximal step for the cost of a model's GBLR layers after every step of its optimizer.

    The cost is that of the layers relative to their dense ones,

        C = sum_l rows_l sum_k (w_k out_l + v_k in_l) / sum_l rows_l out_l in_l

    with w_k and v_k the widths, clamped to [0, 1], of the rows and columns of component k of layer l: multiply-adds, or
    with all ``rows_l`` equal, parameters.  Its proximal step is a soft threshold, larger where a width costs more:
    w_k loses rate rows_l out_l / S and v_k rate rows_l in_l / S, S the largest of these products, until it is 0.  (The
    mean of all widths, whose step is the same for all, would spend the budget on layers that cost little.)  No step is
    taken while C is at most ``target``, and the last is shortened so that C ends there.

    Args:
        model: its :class:`GaudiGBLR` layers are shrunk.
        target: of C.
        rate: width that the costliest side loses in a step, e.g. strength times learning rate.
        rows: how many rows each layer is applied to for one example, by module name: tokens, or pixels of a
            convolution's output.  Those not named have 1.

    Raises:
        ArgumentError: no such layer in the model, a name of none, a number that is not positive.
    """

    def __init__(self, model: nn.Module, target: float, rate: float, rows: Mapping[str, float] | None = None) -> None:
        layers = {name: module for name, module in model.named_modules() if isinstance(module, GaudiGBLR)}
        rows = rows or {}
        if not layers:
            raise ArgumentError("the model has no GaudiGBLR layers: make some before a WidthBudget")
        if unknown := sorted(rows.keys() - layers.keys()):
            raise ArgumentError(f"rows for {unknown}, which are no GaudiGBLR layers: {sorted(layers)} are")
        for what, value in (("target", target), ("rate", rate), *((f"rows of {name}", n) for name, n in rows.items())):
            if not value > 0:
                raise ArgumentError(f"{what} is {value}: above 0")
        self.target, self.rate = target, rate
        self._widths: list[nn.Parameter] = []
        prices, dense = [], 0.0
        for name, layer in layers.items():
            count = rows.get(name, 1.0)
            dense += count * layer.sizes.parameters
            for widths, features in ((layer.row_widths, layer.out_features), (layer.column_widths, layer.in_features)):
                self._widths.append(widths)
                prices.append(count * features)
        self._prices = [price / dense for price in prices]
        self._layers = list(layers.values())

    @torch.no_grad()
    def cost(self) -> float:
        """C of the widths as they are."""
        return self._cost(0.0)

    def _cost(self, step: float) -> float:
        """C after a proximal step."""
        pairs = zip(self._widths, self._prices, strict=True)
        return sum(price * float((w.double() - step * price).clamp(0, 1).sum()) for w, price in pairs)

    @torch.no_grad()
    def step(self) -> float:
        """Shrink what is above the target, keep widths in [0, 1] and locations in [0, 1); returns C."""
        for widths in self._widths:
            widths.clamp_(0, 1)
        for layer in self._layers:
            for locations in (layer.row_locations, layer.column_locations):
                locations.remainder_(1)
        if (cost := self.cost()) <= self.target:
            return cost
        step = self.rate / max(self._prices)
        if self._cost(step) < self.target:
            step = self._shortened(step)
        for widths, price in zip(self._widths, self._prices, strict=True):
            widths.sub_(step * price).clamp_(0, 1)
        return self.cost()

    def _shortened(self, step: float) -> float:
        """The step after which C is the target, by bisection: C falls with it."""
        low, high = 0.0, step
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if self._cost(middle) > self.target else (low, middle)
        return high

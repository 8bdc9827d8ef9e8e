"""Budgeted shrinking."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from structfly.errors import ArgumentError
from structfly.patterns.gblr_learned import GaudiGBLR
from structfly.patterns.width_budget import WidthBudget


def model() -> nn.Sequential:
    return nn.Sequential(GaudiGBLR(8, 32), nn.ReLU(), GaudiGBLR(32, 16))


def test_cost_is_relative_to_the_dense_layers() -> None:
    layers = model()
    # Full masks of as many components as a side has: 8 (8 + 32) and 16 (32 + 16) of 256 and 512.
    assert WidthBudget(layers, 0.5, 0.1).cost() == pytest.approx((320 + 768) / 768)
    assert WidthBudget(layers, 0.5, 0.1, {"0": 3.0}).cost() == pytest.approx((3 * 320 + 768) / (3 * 256 + 512))


@settings(max_examples=20, deadline=None)
@given(target=st.floats(0.05, 1.2), rate=st.floats(0.01, 0.5), weight=st.floats(0.1, 10))
def test_steps_go_down_to_the_target_and_stay(target: float, rate: float, weight: float) -> None:
    budget = WidthBudget(model(), target, rate, {"2": weight})
    costs = [budget.cost()] + [budget.step() for _ in range(1000)]
    assert all(after <= before for before, after in pairwise(costs))
    reached = costs[-1]
    if costs[0] > target:
        assert reached == pytest.approx(target, rel=1e-4)
    else:
        assert reached == costs[0]


def test_a_step_is_larger_where_width_costs_more() -> None:
    layers = model()
    WidthBudget(layers, 0.1, 0.01, {"2": 2.0}).step()
    first, last = layers[0], layers[2]
    assert isinstance(first, GaudiGBLR)
    assert isinstance(last, GaudiGBLR)
    steps = [1 - widths[0].item() for layer in (first, last) for widths in (layer.row_widths, layer.column_widths)]
    # rows * features: 32, 8, 2 * 16 and 2 * 32, the last of which loses the whole rate.
    assert steps == pytest.approx([0.005, 0.00125, 0.005, 0.01], rel=1e-3)


def test_a_step_is_the_proximal_one() -> None:
    layers = model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, widths in layers.named_parameters():
            if name.endswith("widths"):
                widths.copy_(torch.rand(widths.shape, generator=generator) * 0.1)
    budget = WidthBudget(layers, 1e-3, 0.05)
    before = {name: p.detach().clone() for name, p in layers.named_parameters() if name.endswith("widths")}
    budget.step()
    for name, widths in layers.named_parameters():
        if name in before:
            features = {"0.row": 32, "0.column": 8, "2.row": 16, "2.column": 32}[name.removesuffix("_widths")]
            expected = (before[name] - 0.05 * features / 32).clamp_min(0)
            torch.testing.assert_close(widths.detach(), expected)


def test_widths_and_locations_are_kept_in_range_at_any_cost() -> None:
    layer = GaudiGBLR(8, 8, components=1)
    with torch.no_grad():
        layer.row_widths.fill_(1.5)
        layer.column_widths.fill_(-0.5)
        layer.row_locations.fill_(-0.25)
        layer.column_locations.fill_(2.25)
    WidthBudget(layer, 1.0, 0.1).step()
    assert [p.item() for p in (layer.row_widths, layer.column_widths)] == [1.0, 0.0]
    assert [p.item() for p in (layer.row_locations, layer.column_locations)] == [0.75, 0.25]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ArgumentError, match="no GaudiGBLR layers"):
        WidthBudget(nn.Linear(2, 2), 0.5, 0.1)
    with pytest.raises(ArgumentError, match=r"rows for \['1'\]"):
        WidthBudget(model(), 0.5, 0.1, {"1": 1.0})
    for target, rate, rows in ((0.0, 0.1, 1.0), (0.5, 0.0, 1.0), (0.5, 0.1, 0.0)):
        with pytest.raises(ArgumentError, match=r"is 0\.0: above 0"):
            WidthBudget(model(), target, rate, {"0": rows})

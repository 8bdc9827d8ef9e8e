"""Masks that are computed, that change, or that are no constants."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structfly.patterns.factored_linear.menu import TILES
from tests.compiling import Rewritten
from tests.patterns.factored_linear.layers import Factored, intervals, only

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own deprecations
OP = torch.ops.structfly.gblr_v4.default
INPUTS, OUTPUTS, RANK = 256, 192, 48


class Learned(nn.Module):
    """Generalised block low rank as its authors run it: masks by the Gaussian-Dirichlet function of learned widths and
    locations, several ranks to a component, and the dense weight made at every call; in evaluation what is below a
    threshold is set to 0 in place."""

    sigma: Tensor

    def __init__(self, ranks: int = 2) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.widths = nn.Parameter(0.05 + 0.2 * torch.rand(2, RANK, generator=generator))
        self.locations = nn.Parameter(torch.rand(2, RANK, generator=generator))
        self.right = nn.Parameter(torch.randn(RANK, ranks, INPUTS, generator=generator))
        self.left = nn.Parameter(torch.randn(RANK, OUTPUTS, ranks, generator=generator))
        self.bias = nn.Parameter(torch.randn(OUTPUTS, generator=generator))
        self.register_buffer("sigma", torch.tensor(100.0))

    def mask(self, side: int, n: int) -> Tensor:
        width, place = (
            (s + ((s * n).round() / n - s).detach())[:, None] for s in (self.widths[side], self.locations[side])
        )
        if not self.training:
            width = F.hardshrink(width, 1 / n)
        k = torch.arange(n // 2 + 1, dtype=torch.float32).unsqueeze(0)
        phase = math.pi * k * (1 / n - width - 2 * place) * torch.tensor(1j) - 0.5 / self.sigma**2 * k**2
        spectrum = width * torch.sinc(k * width) / torch.sinc(k / n) * torch.exp(phase)
        mask: Tensor = torch.fft.irfft(spectrum, n=n, norm="forward")
        if not self.training:
            mask[mask.abs() < 1e-3] = 0.0
        return mask

    def forward(self, x: Tensor) -> Tensor:
        right = (self.right * self.mask(0, INPUTS).unsqueeze(1)).reshape(-1, INPUTS)
        left = (self.left * self.mask(1, OUTPUTS).unsqueeze(2)).permute(1, 0, 2).reshape(OUTPUTS, -1)
        return F.linear(x, left @ right, self.bias)


def near(mine: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@torch.no_grad()
def test_learned_masks_are_constants_where_nothing_trains() -> None:
    layer, x = Learned().eval(), torch.randn(5, INPUTS)
    with only(TILES):
        fast = Rewritten(layer)
        near(fast(x), layer(x))
    assert fast.statuses == ["rewritten"]
    assert len(fast.calls_of(OP)) == 1
    left = [node.target for gm in fast.graphs for node in gm.graph.nodes if node.users]
    assert torch.matmul not in left
    for parameter in (layer.left, layer.locations):  # of which the second has the tiles elsewhere
        parameter.copy_(parameter.roll(1, -1))
        near(fast(x), layer(x))


def test_the_zeros_are_those_of_the_masks_that_are_multiplied_by() -> None:
    """What the graph would round otherwise is an input instead: entries of 1e-3 are kept or not in both places."""
    layer, x = Learned().eval(), torch.randn(5, INPUTS)
    with torch.no_grad(), only(TILES):
        fast = Rewritten(layer)
        fast(x)
    (call,) = fast.calls_of(OP)
    needed, pending = set[Any](), [call]
    while pending:
        new = [each for each in pending.pop().all_input_nodes if each not in needed]
        needed.update(new)
        pending.extend(new)
    assert not [node for node in needed if node.target is torch.fft.irfft]


def test_learned_masks_that_train_are_left_with_a_reason() -> None:
    layer, x = Learned(), torch.randn(5, INPUTS)
    fast = Rewritten(layer)
    near(fast(x), layer(x))
    assert [(site.status, site.candidate) for site in fast.sites] == [("missed", ""), ("rewritten", "low_rank")]
    assert re.search("would be masks, of which one cannot be used: .* needs a gradient", fast.sites[0].reason)


def layer_with(rows: Tensor, columns: Tensor) -> Factored:
    return Factored(rows.t().contiguous(), columns, "weight first", "times")


def test_masks_that_change(caplog: pytest.LogCaptureFixture) -> None:
    """Where tiles stand may change; how many there are may not, and the graph is compiled again without the rewrite."""
    rows, columns = intervals(16, 128, 32, 0), intervals(16, 96, 32, 1)
    rows[:], columns[:] = rows[0], columns[0]
    layer, x = layer_with(rows, columns), torch.randn(3, 96)
    with only(TILES):
        fast = Rewritten(layer)
        for by in (0, 1, 2):
            layer.rows.copy_(torch.roll(rows.t(), 32 * by, 0))
            near(fast(x), layer(x))
            gradient = torch.autograd.grad(fast(x).square().sum(), layer.u)[0]
            torch.testing.assert_close(gradient, torch.autograd.grad(layer(x).square().sum(), layer.u)[0])
        assert len(fast.calls_of(OP)) == 1
        layer.rows.fill_(True)
        with caplog.at_level(logging.WARNING, "structfly"):
            near(fast(x), layer(x))
    assert "the masks of a linear need" in caplog.text
    layer.rows.copy_(rows.t())
    near(fast(x), layer(x))


def test_two_linears_with_one_weight() -> None:
    layer = Learned().eval()

    def twice(x: Tensor) -> Tensor:
        left = (layer.left * layer.mask(1, OUTPUTS).unsqueeze(2)).permute(1, 0, 2).reshape(OUTPUTS, -1)
        weight = left @ layer.right.reshape(-1, INPUTS)
        return F.linear(x, weight) + F.linear(x.relu(), weight)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return twice(x)

    x = torch.randn(5, INPUTS)
    with torch.no_grad(), only(TILES):
        fast = Rewritten(Twice())
        near(fast(x), twice(x))
    assert fast.statuses == ["rewritten", "rewritten"]
    assert len(fast.calls_of(OP)) == 2


class Masked(nn.Module):
    """``make`` gives U and V of a layer with a mask."""

    def __init__(self, make: Callable[[Masked], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.make = make
        self.u, self.v = nn.Parameter(torch.randn(64, 32)), nn.Parameter(torch.randn(32, 96))
        self.register_buffer("mask", intervals(32, 96, 40, 0).float())
        self.register_buffer("scale", torch.randn(64, 1))

    mask: Tensor
    scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.make(self)
        return F.linear(x, u @ v)


def mask_written_later(m: Masked) -> tuple[Tensor, Tensor]:
    mask = m.mask * 1.0
    v = m.v * mask
    mask[0] = 1.0
    return m.u, v


def masked_and_written(m: Masked) -> tuple[Tensor, Tensor]:
    v = m.v * m.mask
    v[0] = 1.0
    return m.u, v


def mask_written_before(m: Masked) -> tuple[Tensor, Tensor]:
    mask = m.mask * 1.0
    mask[0] = 1.0
    mask[mask < 0.5] = 0.0
    return m.u, m.v * mask


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda m: (m.u, m.v * (m.v.abs() > 0.5)), "needs a gradient"),
        (mask_written_later, "setitem writes into mask"),
        (masked_and_written, "setitem writes into v"),
        (lambda m: (m.u, m.v * (0 * m.mask)), "every component is empty"),
    ],
)
def test_what_cannot_be_used_is_told(make: Callable[[Masked], tuple[Tensor, Tensor]], reason: str) -> None:
    layer, x = Masked(make), torch.randn(3, 96)
    fast = Rewritten(layer)
    near(fast(x), layer(x))
    missed = [site.reason for site in fast.sites if site.status == "missed"]
    assert len(missed) == 1
    assert reason in missed[0]


@pytest.mark.parametrize(
    "make",
    [
        lambda m: (m.u * m.scale, m.v),
        lambda m: (m.u * m.scale, m.v * torch.ones_like(m.mask)),
        lambda m: (m.u * 2, m.v + m.mask),
    ],
)
def test_what_leaves_no_zeros_is_no_mask(make: Callable[[Masked], tuple[Tensor, Tensor]]) -> None:
    fast = Rewritten(Masked(make))
    fast(torch.randn(3, 96))
    assert [(site.status, site.candidate) for site in fast.sites] == [("rewritten", "low_rank")]


def test_a_mask_that_is_written_before_it_is_used() -> None:
    layer, x = Masked(mask_written_before), torch.randn(3, 96)
    with only(TILES):
        fast = Rewritten(layer)
        near(fast(x), layer(x))
    assert fast.statuses == ["rewritten"]


def test_a_mask_that_is_returned_is_the_callers() -> None:
    layer = Masked(mask_written_before)

    def form(x: Tensor) -> tuple[Tensor, Tensor]:
        mask = (layer.mask > 0.5).float()
        return F.linear(x, layer.u @ (layer.v * mask)), mask.t()

    x = torch.randn(3, 96)
    fast = Rewritten(form)
    value, mask = fast(x)
    mask.zero_()
    near(fast(x)[0], form(x)[0])
    near(value, form(x)[0])
    assert any("is returned, and may be written" in site.reason for site in fast.sites)

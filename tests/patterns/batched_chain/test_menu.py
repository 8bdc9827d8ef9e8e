"""Which chains are predicted to gain."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import structfly
from structfly.records import SiteReport
from tests.compiling import sites_on
from tests.patterns.batched_chain.forms import by_bmm as monarch_by_bmm
from tests.patterns.batched_chain.test_butterfly import butterfly, by_bmm, by_sum
from tests.patterns.linear_cross_entropy.test_menu import H100

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own deprecations


class Monarch(nn.Module):
    def __init__(self, features: int, blocks: int) -> None:
        super().__init__()
        side = features // blocks
        self.first = nn.Parameter(torch.empty(blocks, side, side, dtype=torch.bfloat16))
        self.second = nn.Parameter(torch.empty(blocks, side, side, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        return monarch_by_bmm(x, self.first, self.second)


def site_of(model: nn.Module, *shape: int) -> SiteReport:
    (site,) = sites_on(H100, model, *shape)
    return site


def test_where_copies_cost_more_than_a_call_it_is_rewritten() -> None:
    site = site_of(Monarch(4096, 16), 16384, 4096)
    assert (site.rule, site.status, site.reason) == ("batched_chain", "rewritten", "predicted to be fastest")
    assert site.seconds is not None
    assert site.seconds_kept is not None
    # The op is spared the copy between the products, forward and backward; that of the result costs both the same.
    copy = 2 * 16384 * 4096 * 2 / H100.bandwidth
    assert site.seconds_kept - site.seconds == pytest.approx(2 * (copy - H100.call_seconds))


def test_on_a_cpu_it_is_kept() -> None:
    """The op turns rows into columns there, which costs more than it is spared."""
    (site,) = structfly.explain(Monarch(1024, 8).float())(torch.zeros(256, 1024)).sites
    assert site.status == "kept"


def test_a_small_chain_is_kept() -> None:
    site = site_of(Monarch(64, 4), 8, 64)
    assert site.status == "kept"
    assert "predicted to be fastest as it is" in site.reason


class Butterfly(nn.Module):
    def __init__(self, stage: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.twiddle, self.stage = nn.Parameter(torch.empty(12, 2048, 2, 2, dtype=torch.bfloat16)), stage

    def forward(self, x: Tensor) -> Tensor:
        return butterfly(x, self.twiddle, self.stage, True)


def test_stages_of_a_butterfly_are_merged_to_the_factors_that_cost_least() -> None:
    elementwise, batched = (site_of(Butterfly(stage), 16384, 4096) for stage in (by_sum, by_bmm))
    for site in (elementwise, batched):
        assert (site.status, site.candidate) == ("rewritten", "kronecker of 2")
        assert site.seconds == elementwise.seconds
    # Products of matrices are copied forward and backward; elementwise ones are made in their places.
    assert elementwise.seconds_kept is not None
    assert batched.seconds_kept is not None
    copies = 2 * 12 * 2 * 2 * 16384 * 4096 / H100.bandwidth
    assert batched.seconds_kept - elementwise.seconds_kept == pytest.approx(copies, rel=0.05)

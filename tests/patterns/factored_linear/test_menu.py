"""In which order products are predicted to be fastest."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structfly.patterns.factored_linear import cuts
from structfly.patterns.factored_linear.menu import DENSE, TILES
from structfly.patterns.gblr_tiles import GPU_TILES
from tests.compiling import Rewritten, sites_on
from tests.patterns.factored_linear.layers import Factored, intervals, only
from tests.patterns.linear_cross_entropy.test_menu import H100

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own deprecations


def masked(rank: int, features: int, width: int, form: str) -> Factored:
    rows, columns = (intervals(rank, features, width, seed) for seed in (0, 1))
    return Factored(rows.t().contiguous(), columns, form, "times", torch.bfloat16)


@pytest.mark.parametrize("form", ["weight first", "one by one"])
def test_masks_that_leave_little_are_multiplied_by_their_tiles(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuts, "USUAL_TILES", GPU_TILES)  # as on the device whose profile decides
    (site,) = sites_on(H100, masked(1024, 4096, 256, form), 16384, 4096)
    assert (site.rule, site.status, site.candidate) == ("factored_linear", "rewritten", "gblr")


def test_masks_that_leave_most_are_not() -> None:
    (site,) = sites_on(H100, masked(4096, 4096, 4000, "weight first"), 16384, 4096)
    assert (site.status, site.candidate) == ("kept", "dense")
    assert "predicted to be fastest as it is" in site.reason


class Products(nn.Module):
    def __init__(self, rank: int, *, first: bool) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.empty(4096, rank, dtype=torch.bfloat16))
        self.v = nn.Parameter(torch.empty(rank, 4096, dtype=torch.bfloat16))
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.u @ self.v) if self.first else F.linear(F.linear(x, self.v), self.u)


@pytest.mark.parametrize(
    ("rank", "tokens", "first", "status", "candidate"),
    [
        (512, 16384, True, "rewritten", "low_rank"),
        (4096, 16384, True, "kept", "dense"),
        (4096, 16, True, "rewritten", "low_rank"),
        (512, 16384, False, "kept", "low_rank"),
    ],
)
def test_the_order_of_products(rank: int, tokens: int, first: bool, status: str, candidate: str) -> None:
    (site,) = sites_on(H100, Products(rank, first=first), tokens, 4096)
    assert (site.rule, site.status, site.candidate) == ("factored_linear", status, candidate)


def test_two_thin_products_are_kept_and_said_to_be() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(64, 96)
            self.down, self.up = nn.Linear(64, 4, bias=False), nn.Linear(4, 96, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.add(self.base(x), 0.5 * self.up(self.down(x)))

    fast = Rewritten(Adapted())  # always: there is nothing to rewrite it to
    fast(torch.randn(8, 64))
    (site,) = fast.sites
    assert (site.rule, site.status, site.candidate) == ("factored_linear", "kept", "low_rank")
    assert site.reason == "two products by way of rank 4; those of structfly's low rank are the same two"


def test_a_thin_pair_before_a_loss_is_the_losss() -> None:
    head, labels = nn.Sequential(nn.Linear(64, 8, bias=False), nn.Linear(8, 96)), torch.tensor([0, 1, 2])
    fast = Rewritten(lambda x: F.cross_entropy(head(x), labels))
    fast(torch.randn(3, 64)).backward()
    assert [(site.rule, site.status) for site in fast.sites] == [("linear_cross_entropy", "rewritten")]


def test_two_masked_linears_with_biases() -> None:
    """left (right x + between) + bias."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = masked(40, 64, 16, "one by one").float()
            self.between, self.bias = nn.Parameter(torch.randn(40)), nn.Parameter(torch.randn(64))

        def forward(self, x: Tensor) -> Tensor:
            inner = F.linear(x, self.layer.v * self.layer.columns, self.between)
            return F.linear(inner, self.layer.u * self.layer.rows, self.bias)

    layer, x = Layer(), torch.randn(8, 64)
    for candidate in (TILES, DENSE):
        with only(candidate):
            fast = Rewritten(layer)
            torch.testing.assert_close(fast(x), layer(x))
        gradients = [torch.autograd.grad(each(x).square().sum(), list(layer.parameters())) for each in (fast, layer)]
        for mine, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)
        assert [(site.status, site.candidate) for site in fast.sites] == [("rewritten", candidate)]


def test_two_layers_that_are_not_thin_are_no_pair() -> None:
    fast = Rewritten(nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16)))
    fast(torch.randn(8, 16))
    assert fast.sites == []


def test_products_of_values_are_no_weights() -> None:
    fast = Rewritten(lambda q, k, v: F.linear(F.linear(q, k), v) + F.linear(q, v @ k))
    fast(torch.randn(3, 4), torch.randn(5, 4), torch.randn(6, 5))
    assert fast.sites == []

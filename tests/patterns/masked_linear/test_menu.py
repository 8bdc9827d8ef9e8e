"""Which masked linears are predicted to gain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx, nn

from structfly.backend import read_config
from structfly.config import SiteSettings
from structfly.patterns import DEFAULT_RULES
from structfly.patterns.masked_linear import MaskedLinear
from structfly.patterns.masked_linear.menu import masked_menu
from structfly.patterns.masked_linear.site import MaskedSite
from structfly.records import DeviceProfile, Menu, SiteReport
from structfly.records.layer import LayerSizes
from structfly.rewriter.engine import rewrite_graph
from structfly.rewriter.roofline import evaluate
from tests.patterns.linear_cross_entropy.test_menu import H100
from tests.patterns.masked_linear.layers import Masked, block_mask

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own deprecations


def sites_of(model: nn.Module, *shape: int, profile: DeviceProfile = H100) -> list[SiteReport]:
    sites: list[SiteReport] = []

    def backend(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        sites.extend(rewrite_graph(gm, DEFAULT_RULES, read_config({"strict": True}), lambda device: profile).sites)
        return lambda *arguments: (torch.empty(1),)

    torch._dynamo.reset()
    torch.compile(model, backend=backend)(torch.empty(shape, dtype=torch.bfloat16))
    return sites


@pytest.mark.parametrize(
    ("tokens", "density", "status"),
    [(16384, 0.1, "rewritten"), (16384, 0.25, "rewritten"), (16384, 1.0, "kept")],
)
def test_sparse_enough_is_rewritten(tokens: int, density: float, status: str) -> None:
    mask = block_mask(LayerSizes(4096, 4096), 128, 128, density, 0)
    (site,) = sites_of(Masked(mask, dtype=torch.bfloat16), tokens, 4096)
    assert site.status == status
    if status == "kept":
        assert "predicted to be fastest as it is" in site.reason
        assert "rewrite='always' overrides this" in site.reason
    else:
        assert site.reason == "predicted to be fastest"


def test_a_small_layer_is_kept() -> None:
    (site,) = sites_of(Masked(block_mask(LayerSizes(64, 64), 16, 16, 0.5, 0), dtype=torch.bfloat16), 32, 64)
    assert site.status == "kept"


def test_products_that_are_not_generated_gather() -> None:
    """On a GPU in float32 small blocks are many parts of x."""
    found: list[MaskedSite] = []

    class Noted(MaskedLinear):
        def menu(self, site: MaskedSite, profile: DeviceProfile, settings: SiteSettings) -> Menu:
            found.append(site)
            return super().menu(site, profile, settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "DEFAULT_RULES", (Noted(),))
        sites_of(Masked(block_mask(LayerSizes(4096, 4096), 16, 16, 0.25, 0), dtype=torch.bfloat16), 16384, 4096)
    (site,) = found
    on_gpu = replace(site, device=torch.device("cuda"))

    def seconds(site: MaskedSite) -> float:
        (sparse,) = (each for each in masked_menu(site).candidates if each.rewrites)
        return evaluate(sparse.cost, site.sizes, H100).seconds

    assert seconds(on_gpu) == seconds(site)
    gathered = 2 * 16384 * site.blocks * 16 * 4
    slower = seconds(replace(on_gpu, dtype=torch.float32)) - seconds(replace(site, dtype=torch.float32))
    assert slower == pytest.approx(gathered * (1 + site.gradients) / H100.bandwidth, rel=0.2)

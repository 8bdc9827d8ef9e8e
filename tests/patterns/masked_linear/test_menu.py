"""Which masked linears are predicted to gain."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from structfly.config import SiteSettings
from structfly.patterns.masked_linear import MaskedLinear
from structfly.patterns.masked_linear.menu import masked_menu
from structfly.patterns.masked_linear.site import MaskedSite
from structfly.records import DeviceProfile, Menu
from structfly.records.layer import LayerSizes
from structfly.rewriter.roofline import evaluate
from tests.compiling import sites_on
from tests.patterns.linear_cross_entropy.test_menu import H100
from tests.patterns.masked_linear.layers import Masked, block_mask

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own deprecations


@pytest.mark.parametrize(
    ("tokens", "density", "status"),
    [(16384, 0.1, "rewritten"), (16384, 0.25, "rewritten"), (16384, 1.0, "kept")],
)
def test_sparse_enough_is_rewritten(tokens: int, density: float, status: str) -> None:
    mask = block_mask(LayerSizes(4096, 4096), 128, 128, density, 0)
    (site,) = sites_on(H100, Masked(mask, dtype=torch.bfloat16), tokens, 4096)
    assert site.status == status
    if status == "kept":
        assert "predicted to be fastest as it is" in site.reason
        assert "rewrite='always' overrides this" in site.reason
    else:
        assert site.reason == "predicted to be fastest"


def test_a_small_layer_is_kept() -> None:
    (site,) = sites_on(H100, Masked(block_mask(LayerSizes(64, 64), 16, 16, 0.5, 0), dtype=torch.bfloat16), 32, 64)
    assert site.status == "kept"


def test_products_that_are_not_generated_gather() -> None:
    """On a GPU in float32 small blocks are many parts of x."""
    found: list[MaskedSite] = []

    class Noted(MaskedLinear):
        def menu(self, site: MaskedSite, profile: DeviceProfile, settings: SiteSettings) -> Menu:
            found.append(site)
            return super().menu(site, profile, settings)

    mask = block_mask(LayerSizes(4096, 4096), 16, 16, 0.25, 0)
    sites_on(H100, Masked(mask, dtype=torch.bfloat16), 16384, 4096, rules=(Noted(),))
    (site,) = found
    on_gpu = replace(site, device=torch.device("cuda"))

    def seconds(site: MaskedSite) -> float:
        (sparse,) = (each for each in masked_menu(site).candidates if each.rewrites)
        return evaluate(sparse.cost, site.sizes, H100).seconds

    assert seconds(on_gpu) == seconds(site)
    gathered = 2 * 16384 * site.blocks * 16 * 4
    slower = seconds(replace(on_gpu, dtype=torch.float32)) - seconds(replace(site, dtype=torch.float32))
    assert slower == pytest.approx(gathered * (1 + site.gradients) / H100.bandwidth, rel=0.2)

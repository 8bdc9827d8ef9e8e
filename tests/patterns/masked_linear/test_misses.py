"""Masked weights that are left as they are, and the reason that is given."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from structfly.records.layer import LayerSizes
from tests.compiling import Rewritten
from tests.patterns.masked_linear.layers import block_mask

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own deprecations
SIZES = LayerSizes(64, 32)
BLOCKS = block_mask(SIZES, 16, 16, 0.5, 0).float()
X = torch.linspace(-1, 1, 3 * 64).reshape(3, 64)


def times(layer: Layer) -> Tensor:
    return layer.w * layer.mask


class Layer(nn.Module):
    """A masked linear; ``masked`` says how its weight is made."""

    w: Tensor
    mask: Tensor

    def __init__(self, mask: Any = BLOCKS, masked: Callable[[Layer], Tensor] = times) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(32, 64))
        self.mask = mask if isinstance(mask, nn.Parameter) else mask.clone()
        self.masked = masked

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.masked(self))


def frozen(mask: Tensor) -> Layer:
    return Layer(nn.Parameter(mask.clone(), requires_grad=False))


def in_inference_mode() -> Layer:
    with torch.inference_mode():
        return Layer(BLOCKS)


def written(layer: Layer) -> Tensor:
    layer.mask.mul_(1.0)
    return layer.w * layer.mask


def written_through_a_view(layer: Layer) -> Tensor:
    masked = layer.w * layer.mask
    layer.mask[0].add_(0.0)
    return masked


def without_gradient(layer: Layer) -> Tensor:
    with torch.no_grad():
        return layer.w * layer.mask


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Layer(nn.Parameter(BLOCKS.clone())), "is no constant: .* needs a gradient"),
        (lambda: Layer(masked=lambda m: m.w * (m.w.abs() > 0.1)), "is no constant: .* needs a gradient"),
        (lambda: Layer(BLOCKS.roll(5, 0)), "mask changes between rows 4 and 5; its blocks must have sides of 16, 32"),
        (lambda: Layer(BLOCKS.roll(5, 1)), "mask changes between columns 4 and 5"),
        (lambda: Layer(BLOCKS / 2), "values other than 0 and 1; a weight to be scaled is not a mask"),
        (lambda: Layer(BLOCKS * 0), "the mask keeps nothing"),
        (lambda: Layer(masked=lambda m: m.w * torch.eye(32, 64)), "eye is not known to be made of constants"),
        (lambda: Layer(masked=written), "mul_ writes into"),
        (lambda: Layer(masked=written_through_a_view), "add_ writes into getitem"),
        (lambda: Layer(masked=without_gradient), "the weight is masked under no_grad, and the linear is not"),
        (in_inference_mode, "made under torch.inference_mode"),
    ],
)  # fmt: skip
def test_left_with_a_reason(make: Callable[[], nn.Module], reason: str) -> None:
    layer = make()
    fast = Rewritten(layer)
    torch.testing.assert_close(fast(X), layer(X))
    (site,) = fast.sites
    assert (site.rule, site.status) == ("masked_linear", "missed")
    assert re.search(reason, site.reason), site.reason


def test_a_mask_that_is_an_argument_is_left() -> None:
    weight = torch.randn(32, 64)
    fast = Rewritten(lambda x, mask: F.linear(x, weight * mask))
    fast(X, BLOCKS)
    assert "an argument of the compiled function" in fast.sites[0].reason


def test_the_body_of_a_checkpoint_is_left() -> None:
    layer = Layer()
    fast = Rewritten(lambda x: checkpoint(layer, x, use_reentrant=False))
    fast(X).sum().backward()
    assert "given to a checkpoint or a subgraph" in fast.sites[0].reason


@pytest.mark.parametrize(
    "masked",
    [
        lambda m: m.w * 0.5,
        lambda m: m.w * m.mask[:, :1],
        lambda m: m.w.masked_fill(m.mask == 0, 1.0),
        lambda m: torch.where(m.mask > 0, m.w, m.w.detach()),
        lambda m: m.w + m.mask,
        lambda m: torch.cat([m.w[:16], m.w[16:]]),
    ],
)
def test_scaled_weights_are_no_masked_ones(masked: Callable[[Layer], Tensor]) -> None:
    fast = Rewritten(Layer(masked=masked))
    fast(X)
    assert fast.sites == []


def test_a_frozen_mask_and_a_frozen_weight() -> None:
    """Either factor is a constant then; the one that is a mask is the mask."""
    for masked in (lambda m: m.w * m.mask, lambda m: m.mask * m.w):
        layer = frozen(BLOCKS).requires_grad_(False)
        layer.masked = masked
        fast = Rewritten(layer)
        torch.testing.assert_close(fast(X), layer(X))
        assert fast.statuses == ["rewritten"]


def test_a_frozen_weight_with_a_mask_of_no_blocks_says_so_of_the_mask() -> None:
    layer = frozen(BLOCKS.roll(5, 0)).requires_grad_(False)
    layer.masked = lambda m: m.mask * m.w
    fast = Rewritten(layer)
    fast(X)
    assert "mask changes between rows 4 and 5" in fast.sites[0].reason


def test_a_weight_that_is_written_between_is_left() -> None:
    class Written(Layer):
        def forward(self, x: Tensor) -> Tensor:
            masked = self.w * self.mask
            with torch.no_grad():
                self.w.mul_(2.0)
            return F.linear(x, masked)

    layer, other = Written().requires_grad_(False), Written().requires_grad_(False)
    fast = Rewritten(layer)
    torch.testing.assert_close(fast(X), other(X))
    assert "writes into a tensor that the nodes of this site read" in fast.sites[0].reason


def test_a_masked_weight_that_is_written_into_is_left() -> None:
    class Written(Layer):
        def forward(self, x: Tensor) -> Tensor:
            masked = self.w * self.mask
            masked[0] = 1.0
            return F.linear(x, masked)

    layer = Written()
    fast = Rewritten(layer)
    torch.testing.assert_close(fast(X), layer(X))
    assert "writes into masked, which this site makes and uses" in fast.sites[0].reason


def test_a_masked_head_goes_to_the_loss() -> None:
    layer, labels = Layer(), torch.tensor([0, 1, 2])
    fast = Rewritten(lambda x: F.cross_entropy(layer(x), labels))
    fast(X).backward()
    assert [(site.rule, site.status) for site in fast.sites] == [("linear_cross_entropy", "rewritten")]

"""What is compiled stays right when the mask changes, and for other modules that run the same graph."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import structfly
from structfly.records.layer import LayerSizes
from tests.compiling import ALWAYS, Rewritten
from tests.patterns.masked_linear.layers import Masked, block_mask

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own deprecations
SIZES = LayerSizes(96, 64)
MASK = block_mask(SIZES, 16, 16, 0.4, 1)
X = torch.linspace(-1, 1, 5 * 96).reshape(5, 96)


def assert_right(fast: object, layer: nn.Module, x: Tensor = X) -> None:
    """Value and gradient of the weight are those of the layer as it is now."""
    weight = layer.get_parameter("weight")
    value, exact = fast(x), layer(x)  # type: ignore[operator]
    torch.testing.assert_close(value, exact)
    (gradient,) = torch.autograd.grad(value.square().sum(), weight)
    (expected,) = torch.autograd.grad(exact.square().sum(), weight)
    torch.testing.assert_close(gradient, expected)


def test_a_mask_that_is_written_in_place() -> None:
    layer = Masked(MASK)
    fast = Rewritten(layer, then="aot_eager")
    assert_right(fast, layer)
    layer.mask.copy_(MASK.roll(16, 1))
    assert_right(fast, layer)
    layer.mask.data.copy_(MASK)  # which nobody sees
    structfly.refresh()
    assert_right(fast, layer)
    assert fast.statuses == ["rewritten"]


def test_a_mask_that_is_replaced() -> None:
    layer = Masked(MASK)
    fast = Rewritten(layer)
    assert_right(fast, layer)
    layer.mask = MASK.roll(16, 1).float()
    assert_right(fast, layer)
    layer.load_state_dict({**layer.state_dict(), "mask": MASK.roll(32, 1).float()})
    assert_right(fast, layer)


def test_layers_that_run_one_graph_with_masks_of_their_own() -> None:
    layers = [Masked(MASK.roll(16 * n, 1)) for n in range(3)]
    fast = Rewritten(lambda layer, x: layer(x))
    for layer in (*layers, *layers):
        assert_right(lambda x, layer=layer: fast(layer, x), layer)
    assert fast.statuses == ["rewritten"]


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (block_mask(SIZES, 16, 16, 0.9, 2), "; compiled were 8 blocks of 16 x 16, in all rows"),
        (block_mask(SIZES, 32, 32, 0.4, 2), "blocks of 32 x 32"),
        (
            torch.kron(torch.tensor([[1, 1, 1], [1, 0, 1], [1, 0, 1], [0, 0, 1]]), torch.ones(16, 32)),
            "keeps 8 blocks of 16 x 32, in all rows; compiled were 8 blocks of 16 x 16, in all rows",
        ),
        (MASK.roll(3, 1), "the mask changes between columns"),
        (MASK.float() * 0.5, "values other than 0 and 1"),
    ],
)
def test_a_mask_that_does_not_fit_is_run_by_the_graph_as_it_was(
    other: Tensor, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    layer, unfit = Masked(MASK), Masked(MASK)
    unfit.mask.copy_(other)
    fast = Rewritten(lambda layer, x: layer(x))

    def check(each: Masked) -> None:
        assert_right(lambda x: fast(each, x), each)

    check(layer)
    with caplog.at_level(logging.WARNING, "structfly"):
        check(unfit)
        check(unfit)
    messages = [record.getMessage() for record in caplog.records if record.name == "structfly"]
    assert len(messages) == 1
    assert reason in messages[0]
    assert fast.statuses == ["rewritten", "missed"]
    check(layer)
    layer.mask.copy_(other)
    check(layer)
    layer.mask.copy_(MASK)
    check(layer)
    assert len(fast.statuses) == 2  # nothing was compiled again


def test_the_graph_as_it_was_keeps_its_other_rewrites() -> None:
    layer, labels = Masked(MASK), torch.tensor([0, 1, 2, 3, 4])
    head = nn.Linear(64, 50)

    def step(x: Tensor) -> Tensor:
        return nn.functional.cross_entropy(head(layer(x)), labels)

    fast = Rewritten(step)
    torch.testing.assert_close(fast(X), step(X))
    layer.mask.fill_(1.0)
    torch.testing.assert_close(fast(X), step(X))
    found = [(site.rule, site.status) for site in fast.sites]
    assert found == [
        ("masked_linear", "rewritten"),
        ("linear_cross_entropy", "rewritten"),
        ("masked_linear", "missed"),
        ("linear_cross_entropy", "rewritten"),
    ]


def test_batches_of_any_size_take_one_graph() -> None:
    layer = Masked(MASK)
    fast = Rewritten(layer, then="aot_eager", dynamic=True)
    for rows in (5, 2, 9):
        assert_right(fast, layer, torch.randn(rows, 96))
    assert fast.statuses == ["rewritten"]


def test_a_mask_made_in_the_graph_of_nothing() -> None:
    class Triangle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 96))

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.kron(torch.tril(torch.ones(4, 6)), torch.ones(16, 16))
            return nn.functional.linear(x, self.weight * mask)

    layer = Triangle()
    fast = Rewritten(layer)
    assert_right(fast, layer)
    assert_right(fast, layer)
    assert fast.statuses == ["rewritten"]


def test_a_mask_of_whole_blocks() -> None:
    """One number for each block, of a weight that is viewed in blocks."""

    class Blocks(nn.Module):
        blocks: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 96))
            self.register_buffer("blocks", MASK[::16, ::16].float())

        def forward(self, x: Tensor) -> Tensor:
            kept = self.weight.view(4, 16, 6, 16) * self.blocks[:, None, :, None]
            return x @ kept.reshape(64, 96).t()

    layer = Blocks()
    fast = Rewritten(layer)
    assert_right(fast, layer)
    layer.blocks.copy_(layer.blocks.roll(1, 1))
    assert_right(fast, layer)
    assert fast.statuses == ["rewritten"]


def test_a_masked_weight_that_several_read() -> None:
    """Two linears, one of them of another batch, and a sum; each linear is a site."""

    class Shared(Masked):
        def forward(self, x: Tensor) -> Tensor:
            masked = self.weight * self.mask
            twice = nn.functional.linear(x, masked) + nn.functional.linear(x[:1], masked, self.bias)
            return twice + masked.square().sum() + self.weight.sum()

    layer = Shared(MASK)
    fast = Rewritten(layer, then="aot_eager")
    assert_right(fast, layer)
    assert fast.statuses == ["rewritten", "rewritten"]


def test_pruned_layers_of_torch() -> None:
    layer = prune.custom_from_mask(nn.Linear(96, 64), "weight", MASK)
    fast = Rewritten(layer)
    torch.testing.assert_close(fast(X), layer(X))
    assert fast.statuses == ["rewritten"]


def test_a_training_step_through_inductor_moves_kept_weights_only() -> None:
    torch.manual_seed(0)
    options: Any = ALWAYS
    layer = nn.Sequential(Masked(MASK), nn.ReLU(), nn.Linear(64, 8))
    other = copy.deepcopy(layer)
    for model in (layer, other):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        fast = torch.compile(model, backend="structfly", options=options) if model is layer else model
        for _ in range(3):
            optimizer.zero_grad()
            fast(X).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(layer[0].weight, other[0].weight)


@pytest.mark.parametrize("within", [False, True])
def test_autocast(within: bool) -> None:
    layer = Masked(MASK)

    def step(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            result: Tensor = layer(x)
        return result

    fast = Rewritten(step if within else layer)
    with torch.autocast("cpu", torch.bfloat16, enabled=not within):
        value = fast(X)
    assert fast.statuses == ["rewritten"]
    assert value.dtype == torch.bfloat16
    torch.testing.assert_close(value.float(), layer(X), rtol=0.02, atol=0.02)

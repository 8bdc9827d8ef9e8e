"""Which layers are found, and why others are left."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

from structfly import Budget, restructure_
from structfly.patterns.low_rank import LowRank
from structfly.patterns.structure import StructuredLinear
from structfly.restructure.layers import find_layers


class Adapter(nn.Module):
    """As LoRA libraries wrap a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(8, 8)
        self.lora_A, self.lora_B = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)


class Quantised(nn.Linear):
    """As libraries that quantise subclass nn.Linear."""


def test_layers_that_are_left_have_a_reason() -> None:
    model = nn.ModuleDict(
        {
            "plain": nn.Linear(8, 8),
            "adapter": Adapter(),
            "quantised": Quantised(8, 8),
            "attention": nn.MultiheadAttention(8, 2),
            "normed": parametrizations.weight_norm(nn.Linear(8, 8)),
            "structured": StructuredLinear(LowRank(rank=2), 8, 8),
            "wide": nn.Conv2d(8, 8, 3),
            "strided": nn.Conv2d(8, 8, 1, stride=2),
            "point": nn.Conv2d(8, 8, 1),
            "gpt2": Conv1D(8, 8),  # type: ignore[no-untyped-call]
            "head": nn.Linear(8, 8),
        }
    )
    layers, left = find_layers(model)
    assert {name: layer.kind for name, layer in layers.items()} == {
        "plain": "linear",
        "adapter.lora_A": "linear",
        "adapter.lora_B": "linear",
        "point": "1x1 convolution",
        "gpt2": "transformers' Conv1D",
    }
    assert left == {
        "adapter.base_layer": "an adapter is wrapped around it; merge the adapter first",
        "quantised": "it is a Quantised, not a plain nn.Linear",
        "attention.out_proj": "it is a NonDynamicallyQuantizableLinear, not a plain nn.Linear",
        "normed": "it is a ParametrizedLinear, not a plain nn.Linear",
        "structured": "it is structured already",
        "head": "it is the head, which is excluded by default",
    }


def test_a_layer_that_is_the_whole_model_is_left() -> None:
    layers, left = find_layers(nn.Linear(4, 4))
    assert not layers
    assert left == {"": "it is the whole model; put it into a torch.nn.Sequential"}


@pytest.mark.parametrize("bias", [True, False])
def test_every_kind_computes_the_same_at_full_rank(bias: bool) -> None:
    class Kinds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.point = nn.Linear(6, 9, bias), nn.Conv2d(7, 5, 1, bias=bias)
            self.gpt2 = Conv1D(7, 9)  # type: ignore[no-untyped-call]

        def forward(self, x: Tensor) -> Tensor:
            hidden: Tensor = self.gpt2(self.linear(x))
            out: Tensor = self.point(hidden.movedim(-1, 0)).movedim(0, -1)
            return out

    torch.manual_seed(0)
    model, x = Kinds().double(), torch.randn(3, 4, 6, dtype=torch.float64)
    expected = model(x)
    layers, _ = find_layers(model)
    for name, layer in layers.items():
        structured = StructuredLinear.from_linear(layer.as_linear(), LowRank(rank=min(layer.sizes)))
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer.in_place_of(structured))
    assert len(layers) == 3
    torch.testing.assert_close(model(x), expected)


def test_a_weight_that_is_read_elsewhere_is_left() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            first = F.linear(self.first(x), self.first.weight)
            second: Tensor = self.second(x)
            return first + second

    model = Shared()
    plan = restructure_(
        model,
        Budget(params=0.9),
        calibration=[torch.randn(16, 8)],
        loss_fn=lambda model, batch: model(batch).square().mean(1),
        progress=False,
    )
    assert plan.left["first"] == "its weight is read by something else than the layer"
    assert set(plan.layers) == {"second"}
    model(torch.randn(2, 8))

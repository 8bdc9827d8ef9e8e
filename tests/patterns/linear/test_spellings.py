"""Every spelling of a linear layer, with structures of every kind, computes what the projected weight would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from structfly.patterns.structures import STRUCTURES
from structfly.records.layer import LayerSizes
from tests.compiling import Rewritten
from tests.oracle import assert_as_accurate
from tests.patterns.linear.layers import SPELLINGS, Model, Spelled, assert_structured, planned, projected

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own deprecations
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@settings(max_examples=60, deadline=None)
@given(
    spelling=st.sampled_from(sorted(SPELLINGS)),
    name=st.sampled_from(sorted(STRUCTURES)),
    pick=st.integers(0, 1000),
    sizes=st.builds(LayerSizes, st.integers(1, 40), st.integers(1, 40)),
    rows=st.lists(st.integers(0, 3), max_size=3),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_a_layer_computes_what_its_projected_weight_would(
    spelling: str,
    name: str,
    pick: int,
    sizes: LayerSizes,
    rows: list[int],
    bias: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    menu = STRUCTURES[name].menu(sizes)
    if not menu or (not rows and spelling != "linear"):
        return
    structure = menu[pick % len(menu)]
    torch.manual_seed(seed)
    model = Model(Spelled(spelling, sizes, bias, dtype)).eval()
    x = torch.randn(*rows, sizes.in_features, dtype=dtype)
    fast = Rewritten(model, {"plan": planned(layer=(structure, sizes)), "strict": True})
    with torch.no_grad():
        value = fast(x)
    assert fast.statuses == ["rewritten"]
    assert fast.sites[0].candidate == repr(structure)
    weight = model.get_parameter("layer.weight")
    stored = spelling.startswith("in_out")
    dense = projected(structure, weight.t() if stored else weight, dtype)
    assert_structured(value, model, {"layer.weight": dense.t() if stored else dense}, x, dtype)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.layer(x))
        x.add_(1.0)  # a write between the calls, into what neither of them reads later
        result: Tensor = self.layer(x)
        return result


def test_a_module_that_is_called_twice_is_one_site() -> None:
    model, sizes = Twice().eval(), LayerSizes(12, 12)
    structure = STRUCTURES["monarch"].menu(sizes)[0]
    fast = Rewritten(model, {"plan": planned(layer=(structure, sizes)), "strict": True})
    x = torch.randn(5, 12)
    with torch.no_grad():
        value = fast(x)
    (site,) = fast.sites
    assert (site.status, len(site.nodes)) == ("rewritten", 2)
    assert_structured(value, model, {"layer.weight": projected(structure, model.layer.weight, torch.float32)}, x)


@settings(max_examples=15, deadline=None)
@given(order=st.lists(st.sampled_from("abc"), min_size=2, max_size=6))
def test_layers_that_follow_each_other_directly(order: list[str]) -> None:
    """What one takes is what another made, and each may stand in several places."""
    torch.manual_seed(0)
    sizes = LayerSizes(12, 12)
    layers = nn.ModuleDict({name: nn.Linear(12, 12) for name in "abc"}).eval()
    structures = {name: STRUCTURES["low_rank"].menu(sizes)[n] for n, name in enumerate("abc", start=2)}

    def run(x: Tensor) -> Tensor:
        for name in order:
            x = layers[name](x)
        return x

    plan = planned(**{name: (structure, sizes) for name, structure in structures.items()})
    fast = Rewritten(run, {"plan": plan, "strict": True})
    x = torch.randn(5, 12)
    with torch.no_grad():
        value = fast(x)
        exact = x.double()
        for name in order:
            dense = projected(structures[name], layers[name].get_parameter("weight"), torch.float32)
            exact = F.linear(exact, dense, layers[name].get_parameter("bias").double())
    assert fast.statuses == ["rewritten"] * len(set(order))
    torch.testing.assert_close(value, exact.float())


def test_a_conv1d_of_transformers() -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    sizes = LayerSizes(20, 28)
    conv: nn.Module = Conv1D(sizes.out_features, sizes.in_features)  # type: ignore[no-untyped-call]
    model = Model(conv).eval()
    structure = STRUCTURES["low_rank"].menu(sizes)[10]
    fast = Rewritten(model, {"plan": planned(layer=(structure, sizes)), "strict": True})
    x = torch.randn(2, 3, 20)
    with torch.no_grad():
        value = fast(x)
    assert fast.statuses == ["rewritten"]
    weight = model.get_parameter("layer.weight")
    assert_structured(value, model, {"layer.weight": projected(structure, weight.t(), torch.float32).t()}, x)


@pytest.mark.parametrize("within", [False, True])
def test_autocast_makes_factors_of_its_dtype(within: bool) -> None:
    """Autocast outside of what is compiled, and inside of it."""
    torch.manual_seed(0)
    sizes = LayerSizes(24, 16)
    model = Model(Spelled("linear", sizes, True, torch.float32)).eval()
    structure = STRUCTURES["low_rank"].menu(sizes)[5]

    def cast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            result: Tensor = model(x)
        return result

    plan = planned(layer=(structure, sizes))
    fast = Rewritten(cast if within else model, {"plan": plan, "strict": True})
    x = torch.randn(7, 24)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=not within):
        value = fast(x)
    assert fast.statuses == ["rewritten"]
    assert value.dtype == torch.bfloat16
    (call,) = fast.calls_of(torch.ops.structfly.low_rank_v3.default)
    factors: Any = call.args[1]
    assert call.meta["example_value"][0].dtype == torch.bfloat16
    assert [factor.meta["example_value"].dtype for factor in factors] == [torch.bfloat16] * 2
    dense = projected(structure, model.get_parameter("layer.weight"), torch.bfloat16)
    assert_structured(value, model, {"layer.weight": dense}, x.bfloat16(), torch.bfloat16)


def test_calls_of_one_layer_in_two_dtypes_take_factors_of_both() -> None:
    torch.manual_seed(0)
    layer, sizes = nn.Linear(12, 12).eval(), LayerSizes(12, 12)
    structure = STRUCTURES["low_rank"].menu(sizes)[1]

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            half = layer(x)
        return half, layer(x)

    fast = Rewritten(both, {"plan": planned(layer=(structure, sizes)), "strict": True})
    x = torch.randn(5, 12)
    with torch.no_grad():
        half, full = fast(x)
    assert [site.status for site in fast.sites] == ["rewritten"]
    for value, dtype in ((half, torch.bfloat16), (full, torch.float32)):
        dense = projected(structure, layer.weight, dtype)
        exact = F.linear(x.to(dtype).double(), dense, layer.bias.to(dtype).double())
        eager = F.linear(x.to(dtype), dense.to(dtype), layer.bias.to(dtype))
        assert_as_accurate(value, eager, exact, dtype, str(dtype))

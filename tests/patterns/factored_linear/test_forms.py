"""Factored linears in every form and order compute what eager does, gradients included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from structfly.patterns.factored_linear.menu import DENSE, PRODUCTS, TILES
from tests.compiling import Rewritten
from tests.oracle import assert_like_eager
from tests.patterns.factored_linear.layers import FORMS, MASKINGS, Factored, intervals, only

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own deprecations
OP = torch.ops.structfly.gblr_v4.default


class Given(nn.Module):
    """The layer with its parameters as a module keeps them, and x and the bias as arguments."""

    def __init__(self, layer: Factored) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.layer.apply_to(x, self.layer.u, self.layer.v, bias).flatten(0, -2)


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(sorted(FORMS)),
    masking=st.sampled_from(sorted(MASKINGS)),
    one_side=st.booleans(),
    sizes=st.tuples(st.integers(2, 150), st.integers(2, 150), st.integers(2, 40)),
    share=st.floats(0.05, 0.9),
    rows=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    bias=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.float64, torch.bfloat16)),
    candidate=st.sampled_from((DENSE, PRODUCTS, TILES)),
    seed=st.integers(0, 1000),
)
def test_value_and_gradients_are_eagers(
    form: str,
    masking: str,
    one_side: bool,
    sizes: tuple[int, int, int],
    share: float,
    rows: list[int],
    bias: bool,
    dtype: torch.dtype,
    candidate: str,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    in_features, out_features, rank = sizes
    masks = [intervals(rank, size, max(1, int(share * size)), seed) for size in (out_features, in_features)]
    masks[one_side] = torch.ones_like(masks[one_side]) if one_side else masks[one_side]
    layer = Factored(masks[0].t().contiguous(), masks[1], form, masking, dtype)
    run = Given(layer)
    x = torch.randn(*rows, in_features, dtype=dtype, requires_grad=True)
    b = torch.randn(out_features, dtype=dtype, requires_grad=True) if bias else None
    with only(candidate):
        fast = Rewritten(run)
        fast(x, b)

    def eager(x: Tensor, bias: Tensor | None, u: Tensor, v: Tensor) -> Tensor:
        return layer.apply_to(x, u, v, bias).flatten(0, -2)

    def compiled(x: Tensor, bias: Tensor | None, u: Tensor, v: Tensor) -> Tensor:
        value: Tensor = fast(x, bias)
        return value

    upstream = torch.randn(torch.Size(rows).numel(), out_features, dtype=dtype)
    as_it_is = candidate == (DENSE if form.startswith("weight first") else PRODUCTS)
    assert_like_eager(compiled, eager, [x, b, layer.u, layer.v], dtype, upstream)
    assert fast.statuses == ["kept" if as_it_is else "rewritten"]
    assert len(fast.calls_of(OP)) == (candidate == TILES)

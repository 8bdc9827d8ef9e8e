"""Every spelling of a masked linear, with masks of all kinds, computes what eager does, gradients included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from structfly.lowering.block_sparse.layout import BLOCK_SIZES
from structfly.records.layer import LayerSizes
from tests.compiling import Rewritten
from tests.oracle import assert_like_eager
from tests.patterns.linear.layers import SPELLINGS
from tests.patterns.masked_linear.layers import MASKINGS, Masked, block_mask

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own deprecations
OP = torch.ops.structfly.block_sparse_v3.default


@settings(max_examples=60, deadline=None)
@given(
    spelling=st.sampled_from(sorted(SPELLINGS)),
    masking=st.sampled_from(sorted(MASKINGS)),
    blocks=st.tuples(st.sampled_from(BLOCK_SIZES[:3]), st.sampled_from(BLOCK_SIZES[:3])),
    sizes=st.builds(LayerSizes, st.integers(1, 150), st.integers(1, 150)),
    density=st.floats(0, 1),
    rows=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    bias=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.float64, torch.bfloat16)),
    seed=st.integers(0, 1000),
)
@example(  # the gradient of x is one number, whose sum nearly cancels
    spelling="addmm",
    masking="cast",
    blocks=(16, 16),
    sizes=LayerSizes(1, 30),
    density=1.0,
    rows=[1],
    bias=False,
    dtype=torch.float32,
    seed=1,
)
def test_value_and_gradients_are_eagers(
    spelling: str,
    masking: str,
    blocks: tuple[int, int],
    sizes: LayerSizes,
    density: float,
    rows: list[int],
    bias: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    layer = Masked(block_mask(sizes, *blocks, density, seed), spelling, masking, dtype)
    x = torch.randn(*rows, sizes.in_features, dtype=dtype, requires_grad=True)

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return layer.apply_to(x, weight, bias).flatten(0, -2)

    class Run(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return run(x, weight, bias)

    fast = Rewritten(Run())
    value_of = [x, layer.weight.detach().requires_grad_(), layer.bias.detach().requires_grad_() if bias else None]
    upstream = torch.randn(torch.Size(rows).numel(), sizes.out_features, dtype=dtype)
    assert_like_eager(fast, run, value_of, dtype, upstream)
    assert fast.statuses == ["rewritten"]
    assert len(fast.calls_of(OP)) == 1

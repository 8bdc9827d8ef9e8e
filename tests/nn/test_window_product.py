"""Products with windows that are not written, against those with windows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from structfly.nn import window_product
from structfly.nn.windows import windows
from tests.lowering.block_products.test_products import DEVICE, DTYPES, roundings
from tests.oracle import assert_like_eager

PRODUCT: Any = window_product._Product.apply


@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(1, 3),
    longer=st.integers(1, 40),
    reach=st.integers(1, 3),
    out=st.sampled_from((8, 24, 40)),
    dtype=st.sampled_from(DTYPES),
    reverse=st.booleans(),
    bias=st.booleans(),
    frozen=st.booleans(),
)
def test_as_accurate_as_with_windows(
    batch: int, longer: int, reach: int, out: int, dtype: torch.dtype, reverse: bool, bias: bool, frozen: bool
) -> None:
    width = 8
    generator = torch.Generator().manual_seed(longer)

    def leaf(*sizes: int, learned: bool = True) -> Tensor:
        return torch.randn(sizes, generator=generator).to(DEVICE, dtype).requires_grad_(learned)

    leaves = [leaf(batch, reach + longer, width, learned=not frozen), leaf(batch, reach, width)]
    leaves += [leaf(out, (reach + 1) * width), leaf(out, learned=not frozen)] if bias else []
    leaves += [] if bias else [leaf(out, (reach + 1) * width)]

    def mine(*given: Tensor) -> Tensor:
        input, beside, weight, *rest = given
        made: Tensor = PRODUCT(input, beside, weight, rest[0] if rest else None, reverse)
        return made.flatten(0, 1)

    def theirs(*given: Tensor) -> Tensor:
        input, beside, *rest = given
        return functional.linear(windows(input, beside, reverse=reverse), *rest).flatten(0, 1)

    upstream = torch.randn(batch * (reach + longer), out, generator=generator).to(DEVICE)
    assert_like_eager(mine, theirs, leaves, dtype, upstream, roundings(dtype))


def test_the_bias_gets_the_sum_of_all_steps() -> None:
    input, beside, weight = torch.randn(2, 9, 8), torch.randn(2, 1, 8), torch.randn(24, 16)
    leaves = [each.to(DEVICE, torch.bfloat16) for each in (input, beside, weight)]
    bias = torch.zeros(24, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    made: Tensor = PRODUCT(*leaves, bias, False)
    (gradient,) = torch.autograd.grad(made.sum(), bias)
    assert gradient.eq(18).all()


@pytest.mark.gpu
def test_a_long_layer_takes_no_memory_for_windows() -> None:
    layer = nn.Linear(512, 768, device="cuda", dtype=torch.bfloat16)
    input, beside = (torch.randn(1, steps, 256, device="cuda", dtype=torch.bfloat16) for steps in (2**16, 1))
    assert not window_product.why_written(layer, input, beside)
    expected = layer(windows(input, beside, reverse=False))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    made = window_product.projected(layer, input, beside, reverse=False)
    assert torch.cuda.max_memory_allocated() - before <= 1.01 * made.numel() * made.element_size()
    assert (made - expected).norm() <= 2**-8 * expected.norm()


def test_what_has_no_generated_product_has_its_windows_written() -> None:
    layer, input = nn.Linear(16, 8), torch.randn(2, 5, 8)
    for reach, word in ((0, "one step"), (5, "not longer"), (1, "on cpu")):
        beside = torch.randn(2, reach, 8)
        assert word in window_product.why_written(layer, input, beside)
    hooked = nn.Linear(16, 8)
    hooked.register_full_backward_hook(lambda *_: None)
    for other in (nn.Sequential(layer), hooked):
        assert "no plain" in window_product.why_written(other, input, input[:, :1])
    assert "dtypes" in window_product.why_written(layer, input.bfloat16(), input[:, :1])
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in window_product.why_written(layer, input, input[:, :1])
    apart = nn.Linear(16, 8)
    apart.weight = nn.Parameter(torch.randn(8 * 16 + 1)[1:].view(8, 16))
    beyond = torch.randn(2 * 5 * 8 + 1)[1:].view(2, 5, 8)
    for other, steps in ((apart, input), (layer, beyond)):
        assert "begin at a multiple of 16" in window_product.why_written(other, steps, input[:, :1])

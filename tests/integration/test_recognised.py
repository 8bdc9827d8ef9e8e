"""Structured layers written in plain torch, recognised and compiled by Inductor, on a GPU."""

from __future__ import annotations

import copy

import pytest
import torch

from benchmarks.recognised import LAYERS, made
from benchmarks.structured_layers import Place
from structfly.records.layer import LayerSizes
from tests.compiling import Rewritten
from tests.oracle import assert_as_accurate

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]  # torch's own deprecations


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", sorted(LAYERS))
def test_values_and_gradients_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    layer = made(LAYERS[name], LayerSizes(1024, 1024), Place("cuda", dtype))
    exact, eager = copy.deepcopy(layer).double(), copy.deepcopy(layer)
    torch.manual_seed(1)
    x, upstream = (torch.randn(777, 1024, device="cuda").to(dtype) for _ in range(2))
    fast = Rewritten(layer, then="inductor")
    found = []
    for run, module in ((fast, layer), (eager, eager), (exact, exact)):
        own = x.to(next(module.parameters()).dtype).requires_grad_()
        value = run(own)
        found.append([value.detach(), *torch.autograd.grad(value, [own, *module.parameters()], upstream.to(own.dtype))])
    left = (name, dtype) == ("butterfly", torch.float32)  # it is elementwise
    assert fast.statuses == ["missed" if left else "rewritten"]
    for number, (mine, theirs, reference) in enumerate(zip(*found, strict=True)):
        assert_as_accurate(mine, theirs, reference, dtype, f"result {number}", roundings=2)

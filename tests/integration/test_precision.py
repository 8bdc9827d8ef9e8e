"""float16 and float32 heads at every reduction, and TF32 as the user has it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.compiling import Rewritten
from tests.oracle import assert_like_eager, errors, in_float64, value_and_gradients
from tests.precision import matmul_precision


def inputs(
    rows: int, hidden: int, classes: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, hidden, generator=generator).div(hidden**0.25) for n in (rows, classes))
    labels = torch.randint(0, classes, (rows,), generator=generator)
    labels[::7] = -100
    x, w = (tensor.to(device, dtype).requires_grad_() for tensor in (x, w))
    return x, w, labels.to(device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_reduction_at_size(dtype: torch.dtype, reduction: str) -> None:
    def loss(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        z = F.linear(x, w)
        return F.cross_entropy(z if z.dtype == torch.float64 else z.float(), labels, reduction=reduction)

    budget = {"loss_memory": 128 * 1008 * dtype.itemsize}
    fast = Rewritten(loss, {"rewrite": "always", "strict": True, "budget": budget})
    upstream = torch.rand(400 if reduction == "none" else (), generator=torch.Generator().manual_seed(1)) + 0.5
    # In float32 the order of the products' sums is more than one rounding.
    assert_like_eager(
        fast, loss, inputs(400, 64, 1003, dtype), dtype, upstream, roundings=1 if dtype.itemsize == 2 else 8
    )
    assert fast.statuses == ["rewritten"]


@pytest.mark.gpu
def test_float32_products_follow_the_setting_of_tf32() -> None:
    def loss(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, w), labels)

    arguments = inputs(2048, 512, 8192, torch.float32, "cuda")
    exact = value_and_gradients(loss, [in_float64(argument) for argument in arguments])[1]
    made: dict[str, list[float]] = {}
    for precision in ("ieee", "tf32"):
        with matmul_precision(precision):
            fast = Rewritten(loss)
            assert_like_eager(fast, loss, arguments)
            assert fast.statuses == ["rewritten"]
            gradients = value_and_gradients(fast, arguments)[1]
        made[precision] = [
            errors(mine, wanted)[0]
            for mine, wanted in zip(gradients, exact, strict=True)
            if mine is not None and wanted is not None
        ]
    for ieee, tf32 in zip(made["ieee"], made["tf32"], strict=True):
        assert ieee < 1e-5
        assert 1e-4 < tf32 < 1e-2

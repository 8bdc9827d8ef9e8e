"""Masks of the Gaussian-Dirichlet function."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from structfly.patterns.gaussian_dirichlet import gaussian_dirichlet_masks

INFINITE = torch.tensor(math.inf)


def boxcar(features: int, start: int, length: int) -> torch.Tensor:
    mask = torch.zeros(features, dtype=torch.float64)
    mask[[(start + step) % features for step in range(length)]] = 1
    return mask


@given(features=st.integers(1, 70), data=st.data())
def test_infinite_sigma_gives_the_cyclic_boxcar(features: int, data: st.DataObject) -> None:
    pairs = data.draw(
        st.lists(st.tuples(st.integers(0, 2 * features), st.integers(0, features)), min_size=1, max_size=4)
    )
    starts, lengths = (torch.tensor(each, dtype=torch.float64) for each in zip(*pairs, strict=True))
    # Anything that rounds to these steps gives the same.
    off = data.draw(st.floats(-0.49, 0.49)) / features
    masks = gaussian_dirichlet_masks(lengths / features + off, starts / features - off, features, INFINITE)
    expected = torch.stack([boxcar(features, start, length) for start, length in pairs])
    torch.testing.assert_close(masks, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("features", [64, 65])
def test_float32_and_bfloat16_shares_give_float32_masks(features: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        masks = gaussian_dirichlet_masks(
            torch.tensor([0.25], dtype=dtype), torch.tensor([0.5], dtype=dtype), features, INFINITE
        )
        assert masks.dtype == torch.float32
        expected = boxcar(features, round(0.5 * features), round(0.25 * features)).float()
        torch.testing.assert_close(masks[0], expected, rtol=0, atol=1e-5)


def test_a_small_sigma_smooths_and_keeps_the_mean() -> None:
    sharp, smooth = (
        gaussian_dirichlet_masks(torch.tensor([0.25]), torch.tensor([0.5]), 64, torch.tensor(sigma))
        for sigma in (math.inf, 2.0)
    )
    torch.testing.assert_close(smooth.mean(), sharp.mean())
    assert smooth.diff().abs().max() < 0.2 < sharp.diff().abs().max()
    assert smooth.argmax() in (39, 40)  # the middle of 32 ... 47


def test_gradients_are_those_of_the_function_without_rounding() -> None:
    width, location = (torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (0.25, 0.5))
    weights = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor(3.0, dtype=torch.float64)
    loss = (gaussian_dirichlet_masks(width, location, 32, sigma)[0] * weights).sum()
    of_width, of_location = torch.autograd.grad(loss, (width, location))

    def at(w: float, place: float) -> float:
        k = torch.arange(17, dtype=torch.float64)
        size = w * torch.sinc(k * w) / torch.sinc(k / 32) * torch.exp(-0.5 * (k / 3) ** 2)
        angle = math.pi * k * (1 / 32 - w - 2 * place)
        mask = torch.fft.irfft(torch.polar(torch.ones_like(angle), angle) * size, n=32, norm="forward")
        return float((mask * weights).sum())

    step = 1e-6
    assert of_width.item() == pytest.approx((at(0.25 + step, 0.5) - at(0.25 - step, 0.5)) / (2 * step), rel=1e-5)
    assert of_location.item() == pytest.approx((at(0.25, 0.5 + step) - at(0.25, 0.5 - step)) / (2 * step), rel=1e-5)

"""Masks with learned width and location: the Gaussian-Dirichlet function (Lee and Kim, ICLR 2024, arXiv 2309.06656)."""

from __future__ import annotations

import torch
from torch import Tensor


def gaussian_dirichlet_masks(widths: Tensor, locations: Tensor, features: int, sigma: Tensor) -> Tensor:
    """One mask a row: about 1 on a cyclic interval of the features, about 0 elsewhere.

    The mask's Fourier coefficients, k = 0 ... features // 2, are those of the interval that begins at feature l n and
    has w n features,

        (1/n) sum_{j < w n} exp(-2 pi i k (l n + j) / n)
            = w sinc(k w) / sinc(k / n) exp(-2 pi i k l + pi i k (1/n - w)),    sinc(x) = sin(pi x) / (pi x),

    times exp(-k^2 / (2 sigma^2)).  With sigma infinite the mask is that interval; a small sigma smoothes it, so that
    the gradient reaches widths and locations from further away.  Both count in steps of 1/n, n of the mask's own side;
    rounding to them passes gradients straight through.

    Args:
        widths: w (masks,) in [0, 1], the share of the features in the interval.
        locations: l (masks,), where it begins; taken modulo 1.
        features: n.
        sigma: (), > 0, or infinite.

    Returns:
        (masks, features), in the dtype of the arguments, float32 at least.
    """
    dtype = torch.promote_types(widths.dtype, torch.float32)
    width, location = (_rounded(each.to(dtype), features)[:, None] for each in (widths, locations))
    k = torch.arange(features // 2 + 1, dtype=dtype, device=widths.device)
    size = width * torch.sinc(k * width) / torch.sinc(k / features) * torch.exp(-0.5 * (k / sigma.to(dtype)).square())
    angle = torch.pi * k * (1 / features - width - 2 * location)
    coefficients = torch.polar(torch.ones_like(angle), angle) * size
    masks: Tensor = torch.fft.irfft(coefficients, n=features, norm="forward")
    return masks


def _rounded(share: Tensor, features: int) -> Tensor:
    return share + ((share * features).round() / features - share).detach()

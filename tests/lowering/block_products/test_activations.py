"""Activations within the epilogues of all products, interpreted on a CPU: every number by itself, against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from structfly.errors import ArgumentError, StructflyError
from structfly.lowering.activations import ACTIVATIONS, activated
from structfly.lowering.block_products.axes import axis_products
from structfly.lowering.block_products.chunks import chunk_products
from structfly.lowering.block_products.matrices import matrix_products
from structfly.lowering.block_products.products import block_sums
from structfly.lowering.block_products.tiles import Summing
from structfly.lowering.gemm import Tiles
from tests.lowering.block_products.test_products import DEVICE, HALF, ONE

TILES = Tiles(16, 16, 16, 2, 1, 4, 1)


def by_sums(a: Tensor, b: Tensor, c: Tensor, activation: str) -> None:
    block_sums(a[:, None], b[None], c[:, None], ONE, cut=Summing(TILES), activation=activation)


def by_matrices(a: Tensor, b: Tensor, c: Tensor, activation: str) -> None:
    matrix_products(a[:, None, None], b[None, None], c[:, None, None], tiles=TILES, activation=activation)


def along_axes(a: Tensor, b: Tensor, c: Tensor, activation: str) -> None:
    operands = (a[:, None, :, None], b[None, None], c[:, None, :, None])
    axis_products(*operands, tiles=TILES, batch=8, activation=activation)


def in_chunks(a: Tensor, b: Tensor, c: Tensor, activation: str) -> None:
    chunk_products(a[None], b[None], c[None], rows="c", tiles=TILES, activation=activation)(0)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("product", [by_sums, by_matrices, along_axes, in_chunks])
def test_every_number_is_rounded_from_what_float32_has(
    product: Callable[..., None], activation: str, dtype: torch.dtype
) -> None:
    """With b the identity the sums are a: what is left is the activation's error, and one rounding.

    Torch's formulas of gelu lose the rounding of 1 + erf or 1 + tanh, times x / 2: the first, which is also the
    kernel's, in float32, the second in float64 only.
    """
    sizes = torch.cat((torch.logspace(-4, 4.5, 104), torch.linspace(0, 12, 400)))
    a = torch.cat((sizes, -sizes)).view(-1, 16).to(DEVICE, dtype)
    c = torch.full_like(a, float("nan"))
    product(a, torch.eye(16, dtype=dtype, device=DEVICE), c, activation)
    exact = activated(a.double(), activation)
    step = torch.finfo(dtype)
    lost = a.double().abs() * (2.0**-24 if activation == "gelu" else 2.0**-52)
    allowed = (0.5 + 1 / 64) * step.eps * exact.abs() + step.smallest_normal * step.eps + lost
    assert (c.double() - exact).abs().sub(allowed).amax() <= 0


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ArgumentError, match="activation is 'gelu_erf'; it must be one of relu, gelu, gelu_tanh, silu"):
        activated(torch.zeros(1), "gelu_erf")
    a = torch.zeros(16, 16, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(StructflyError, match=r"template 'block_sums': .*'gelu_erf'"):
        by_sums(a, a, torch.empty_like(a), "gelu_erf")

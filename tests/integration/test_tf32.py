"""Structured layers of float32 on a GPU: generated products where TF32 is allowed, torch's where it is not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from structfly import StructuredLinear
from structfly.lowering.launch import Launch
from structfly.patterns.blast import Blast
from structfly.patterns.block_sparse import BlockSparse
from structfly.patterns.gblr import GBLR
from structfly.patterns.kronecker import KroneckerSparse
from structfly.patterns.monarch import Monarch
from structfly.patterns.pixelfly import Pixelfly
from structfly.patterns.structure import Structure
from tests.oracle import FEW, TF32, assert_as_accurate, errors
from tests.precision import matmul_precision

# Torch's own products, where they are the first thing that autograd's thread does.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")]
SIZE = 512
STRUCTURES: tuple[Structure, ...] = (
    Monarch(blocks_in=4, blocks_out=4, block_rank=32),
    Monarch(blocks_in=4, blocks_out=4, block_rank=32, strided=False, rematerialise=True),
    KroneckerSparse(patterns=((1, 64, 64, 8), (8, 64, 64, 1))),
    KroneckerSparse.lattice((8, 8, 8), (8, 8, 8), 1),
    BlockSparse(block_in=64, block_out=64, density=0.5),
    BlockSparse(block_in=16, block_out=32, density=0.25),
    Pixelfly(grid=8, n_factors=2, rank=64),
    Blast(row_blocks=4, column_blocks=8, rank=64),
    Blast(row_blocks=4, column_blocks=8, rank=64, rematerialise=True),
    GBLR(tile=64, group=32, groups=8, right_tiles=40, left_tiles=40),
)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Launches of generated products that were made."""
    made: list[Launch] = []
    launch = Launch.__call__

    def noted(self: Launch, *arguments: Any) -> None:
        made.append(self)
        launch(self, *arguments)

    monkeypatch.setattr(Launch, "__call__", noted)
    return made


def gradients_of(
    layer: StructuredLinear,
    x: Tensor,
    upstream: Tensor,
    *,
    after: str = "",
    call: Callable[[Tensor], Tensor] | None = None,
) -> list[Tensor]:
    """y and the gradients of x and the parameters.

    Args:
        after: what the setting becomes before the backward.
        call: the layer, compiled.
    """
    leaves = [x.detach().requires_grad_(), *layer.parameters()]
    y = (layer if call is None else call)(leaves[0])
    if after:
        torch.backends.cuda.matmul.fp32_precision = after
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


def case(structure: Structure, tokens: int) -> tuple[StructuredLinear, Tensor, Tensor]:
    torch.manual_seed(0)
    layer = StructuredLinear(structure, SIZE, SIZE, device="cuda")
    return layer, torch.randn(tokens, SIZE, device="cuda"), torch.randn(tokens, SIZE, device="cuda")


@pytest.mark.parametrize("tokens", [1, 17, 64, 1000])
@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_they_are_within_roundings_to_tf32(structure: Structure, tokens: int, launched: list[Launch]) -> None:
    layer, x, upstream = case(structure, tokens)
    exact = gradients_of(copy.deepcopy(layer).double(), x.double(), upstream.double())
    with matmul_precision("ieee"):
        whole = gradients_of(layer, x, upstream)
        assert launched == []
    with matmul_precision("tf32"):
        made = gradients_of(layer, x, upstream)
    assert launched
    for mine, single, reference in zip(made, whole, exact, strict=True):
        assert errors(single, reference)[0] < 1e-5
        # A chain of products has each of its operands rounded.
        roundings = 2 * TF32 * (1 if reference.ndim else FEW)
        assert_as_accurate(mine, single, reference, torch.float32, str(structure), roundings=roundings)


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_a_backward_is_right_where_the_setting_has_changed(structure: Structure) -> None:
    layer, x, upstream = case(structure, 200)
    exact = gradients_of(copy.deepcopy(layer).double(), x.double(), upstream.double())
    for before, after in (("tf32", "ieee"), ("ieee", "tf32")):
        with matmul_precision(before):
            made = gradients_of(layer, x, upstream, after=after)
        for mine, reference in zip(made, exact, strict=True):
            assert errors(mine, reference)[0] < 1e-2


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_compiled_graphs_follow_the_setting(structure: Structure, launched: list[str]) -> None:
    layer, x, upstream = case(structure, 200)
    exact = gradients_of(copy.deepcopy(layer).double(), x.double(), upstream.double())
    torch._dynamo.reset()  # all of these layers' forwards are one function to it, with few graphs allowed
    compiled: Callable[[Tensor], Tensor] = torch.compile(layer, fullgraph=True)
    for name, allowed in (("ieee", 1e-5), ("tf32", 1e-2), ("ieee", 1e-5)):
        launched.clear()
        with matmul_precision(name):
            made = gradients_of(layer, x, upstream, call=compiled)
        assert bool(launched) == (name == "tf32")
        for mine, reference in zip(made, exact, strict=True):
            assert errors(mine, reference)[0] < allowed

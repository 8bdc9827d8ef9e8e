"""The FLOP count of a structured layer's step."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from structfly.lowering import layer_flops
from structfly.patterns.block_sparse import BlockSparse
from structfly.patterns.low_rank import LowRank
from structfly.patterns.structure import StructuredLinear

_REGISTERED = layer_flops  # imported for what it registers


@pytest.mark.parametrize("rematerialise", [False, True])
def test_a_step_of_a_layer_is_counted(rematerialise: bool) -> None:
    layer = StructuredLinear(LowRank(rank=3, rematerialise=rematerialise), 8, 16)
    x = torch.randn(2, 5, 8, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        y = layer(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert forward.get_total_flops() == 2 * 10 * 3 * (8 + 16)
    assert backward.get_total_flops() == 2 * forward.get_total_flops() + rematerialise * 2 * 10 * 3 * 8


def test_an_op_that_keeps_nothing_does_not_run_its_forward_again() -> None:
    layer = StructuredLinear(BlockSparse(density=0.5, block_out=16, block_in=16), 32, 48)
    x = torch.randn(10, 32, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        y = layer(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert forward.get_total_flops() == 2 * 10 * 3 * 16 * 16
    assert backward.get_total_flops() == 2 * forward.get_total_flops()

"""Which operands of a chain have gradients in the schemes of generated products, and what they cost a kernel."""

from __future__ import annotations

import pytest
import torch

from structfly.lowering.head.epilogue import parse_epilogue
from structfly.lowering.head.linear import Wanted
from structfly.lowering.linear_cross_entropy.schedule import why_no_blocks, why_no_exponentials


@pytest.mark.parametrize(
    ("chain", "leading", "varies"),
    [
        ("", 0, False),
        ("mul:0.5,neg,add:class0,div:scalar1,rsub:row2", 5, False),
        ("div:30.0,tanh,mul:30.0", 1, True),
        ("mul:class0,add:class1", 0, True),
        ("add:row0,where:class1:scalar2", 1, True),
    ],
)
def test_leading_steps_have_one_slope_a_row(chain: str, leading: int, varies: bool) -> None:
    epilogue = parse_epilogue(chain)
    assert (epilogue.leading, epilogue.slopes_vary) == (leading, varies)


@pytest.mark.parametrize(
    ("chain", "wanted", "served"),
    [
        ("mul:scalar0,add:class1", (True, True), True),
        ("tanh,mul:scalar0,sub:row1", (True, True), True),
        ("mul:class0", (False,), True),
        ("mul:class0", (True,), False),
        ("tanh,add:class0", (True,), False),
        ("add:class0,tanh,mul:class0", (True,), False),
        ("add:class0,tanh,mul:class1", (True, False), True),
        ("where:class0:-inf", (False,), True),
    ],
)
def test_numbers_of_classes_with_gradients_are_added_in_leading_steps(
    chain: str, wanted: tuple[bool, ...], served: bool
) -> None:
    epilogue, gradients = parse_epilogue(chain), Wanted(x=True, weight=True, bias=True, operands=wanted)
    reason = why_no_exponentials(
        torch.bfloat16, 64, epilogue, label_smoothing=0.0, adapter=False, wanted=gradients, statistics=False
    )
    assert (reason == "") == served
    assert (why_no_blocks(epilogue) == "") == (chain == "where:class0:-inf")

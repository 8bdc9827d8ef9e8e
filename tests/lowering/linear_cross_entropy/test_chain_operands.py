"""Which operands of a chain have gradients in the schemes of generated products, and what they cost a kernel."""

from __future__ import annotations

import pytest
import torch

from structfly.lowering.head.epilogue import parse_epilogue
from structfly.lowering.head.linear import Wanted
from structfly.lowering.linear_cross_entropy.chain_operands import ChainOperands
from structfly.lowering.linear_cross_entropy.rows import ClassTerms
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


def chain_operands(chain: str, *wanted: bool, bias: bool = False) -> ChainOperands:
    epilogue = parse_epilogue(chain)
    terms = ClassTerms(
        epilogue=epilogue.without_dead_classes[0],
        operands=tuple(torch.ones(()) for _ in epilogue.operands),
        operand_gradients=wanted,
        bias=None,
        weight=None,
        weight_sum=None,
        label_smoothing=0.0,
        ignore_index=None,
        gradient_scale=1.0,
    )
    return ChainOperands(terms, bias_gradient=bias, classes=5)


def gradients_in(steps: object) -> list[int]:
    """The operands whose gradients are in the source of these steps."""
    assert isinstance(steps, tuple)
    return [index for step in steps for index, _ in step[3]]


def test_templates_are_told_which_gradients_are_wanted_each_time() -> None:
    chain = "mul:scalar0,add:class1,tanh,add:scalar3,masked_fill:class2:-inf"
    seen = [
        (chain_operands(chain, *flags, bias=bias), flags)
        for flags in ((False,) * 4, (True, False, False, True), (False, True, False, False), (True,) * 4)
        for bias in (False, True)
    ]
    for operands, (first, by_class, _, last) in seen:
        along = [index for index, flag in ((0, first), (3, last)) if flag]
        assert operands.parameters["by_row"] == tuple(along)
        assert gradients_in(operands.parameters["steps"]) == along
        rows = operands.row_parameters
        assert rows["by_class"] == (1,) * by_class
        assert gradients_in(rows["leading_steps"]) == [1] * by_class
        assert rows["keeps_label"] == bool(operands.by_row or operands.by_class or rows["bias_gradient"])
    assert [operands.row_parameters["bias_gradient"] for operands, _ in seen] == [False, True] * 4
    other = chain_operands(chain.replace("mul", "div"), True, False, False, True).parameters
    assert other["steps"] != seen[2][0].parameters["steps"]

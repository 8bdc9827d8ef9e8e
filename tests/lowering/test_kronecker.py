"""The op against its reference for factors of any shape, and the copies that it does without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from structfly.lowering import layer_flops
from structfly.lowering.kronecker.op import KRONECKER
from structfly.lowering.kronecker.reference import FactorShape, kronecker_reference

_REGISTERED = layer_flops  # imported for what it registers


@st.composite
def chains(draw: st.DrawFn) -> list[FactorShape]:
    """Factors of which each takes what the one before gives, in any other order of axes."""
    shapes = [FactorShape(*(draw(st.integers(1, 3)) for _ in range(6)))]
    for _ in range(draw(st.integers(0, 2))):
        rest, parts = shapes[-1].features_out, []
        for _ in range(3):
            parts.append(draw(st.sampled_from([n for n in range(1, rest + 1) if rest % n == 0])))
            rest //= parts[-1]
        shapes.append(FactorShape(parts[0], parts[1], draw(st.integers(1, 3)), draw(st.integers(1, 3)), parts[2], rest))
    return shapes


@settings(max_examples=60, deadline=None)
@given(
    shapes=chains(),
    rows=st.integers(0, 4),
    short=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    turned=st.booleans(),
    rematerialise=st.booleans(),
)
def test_value_and_gradients_are_those_of_the_reference(
    shapes: list[FactorShape], rows: int, short: tuple[int, int], turned: bool, rematerialise: bool
) -> None:
    in_features = max(1, shapes[0].features_in - short[0])
    out_features = max(1, shapes[-1].features_out - short[1])
    x = torch.randn(rows, in_features, dtype=torch.float64)
    x = x.t().contiguous().t() if turned else x
    leaves = [x, torch.randn(out_features, dtype=torch.float64)]
    leaves += [torch.randn(*shape, dtype=torch.float64) for shape in shapes]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    x, bias, *factors = leaves
    fast = KRONECKER(x, factors, bias, [out_features], rematerialise=rematerialise)
    slow = kronecker_reference(x, factors, out_features, bias)
    torch.testing.assert_close(fast, slow)
    found, expected = (torch.autograd.grad(y.square().sum(), leaves) for y in (fast, slow))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@given(needs=st.lists(st.booleans(), min_size=3, max_size=3).filter(any))
def test_only_what_is_asked_for_is_differentiated(needs: list[bool]) -> None:
    tensors = [torch.randn(4, 6), torch.randn(1, 2, 4, 1, 3, 1), torch.randn(2, 1, 5, 1, 4, 1)]
    leaves = [tensor.requires_grad_(need) for tensor, need in zip(tensors, needs, strict=True)]
    asked = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
    found = torch.autograd.grad(KRONECKER(leaves[0], leaves[1:], None, [10]).square().sum(), asked)
    expected = torch.autograd.grad(kronecker_reference(leaves[0], leaves[1:], 10).square().sum(), asked)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("last", [FactorShape(3, 1, 5, 1, 8, 1), FactorShape(3, 1, 1, 5, 8, 1)])
def test_two_factors_of_monarch_have_no_copy_between_them(last: FactorShape) -> None:
    x, factors = torch.randn(7, 24), [torch.randn(1, 4, 6, 1, 6, 1), torch.randn(*last)]
    with _Copies() as copies:
        KRONECKER._forward(x, factors, None, [15], True, "", False)
    assert copies.sizes == [7 * 15]  # the outputs, once, in order


def test_flops_are_counted() -> None:
    x, factors = torch.randn(7, 24), [torch.randn(1, 4, 6, 1, 6, 1), torch.randn(3, 1, 5, 1, 8, 1)]
    with FlopCounterMode(display=False) as counter:
        KRONECKER(x, factors, None, [15])
    assert counter.get_total_flops() == 2 * 7 * (4 * 6 * 6 + 3 * 5 * 8)


class _Copies(TorchDispatchMode):
    """Elements of every copy that is made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default):
            assert isinstance(result, Tensor)
            self.sizes.append(result.numel())
        return result

"""Chains of batched products in every form compute what eager does, gradients included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.compiling import Rewritten
from tests.oracle import assert_like_eager
from tests.patterns.batched_chain.forms import FORMS, by_bmm, by_einsum, only

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own deprecations
OP = torch.ops.structfly.kronecker_v3.default
SIZES = st.integers(1, 5)


@settings(max_examples=45, deadline=None)
@given(
    form=st.sampled_from(sorted(FORMS)),
    k=st.integers(2, 5),
    blocks=st.integers(2, 5),
    rank=SIZES,
    sizes=st.tuples(SIZES, SIZES),
    rows=st.lists(st.integers(2, 4), min_size=1, max_size=2),
    dtype=st.sampled_from((torch.float32, torch.float64, torch.bfloat16)),
    wanted=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 1000),
)
def test_value_and_gradients_are_eagers(
    form: str,
    k: int,
    blocks: int,
    rank: int,
    sizes: tuple[int, int],
    rows: list[int],
    dtype: torch.dtype,
    wanted: tuple[bool, bool, bool],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    shapes = [(*rows, k * sizes[0]), (k, rank * blocks, sizes[0]), (blocks, sizes[1], k * rank)]
    arguments = [
        torch.randn(shape, dtype=dtype).requires_grad_(each) for shape, each in zip(shapes, wanted, strict=True)
    ]

    def run(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        return FORMS[form](x, w1, w2).flatten(0, -2)

    fast = Rewritten(run, then="aot_eager")
    upstream = torch.randn_like(run(*arguments))
    assert_like_eager(fast, run, arguments, dtype, upstream)
    assert fast.statuses == ["rewritten"]
    assert len(fast.calls_of(OP)) == 1
    left = [node.target for gm in fast.graphs for node in gm.graph.nodes]
    assert not {torch.bmm, torch.einsum, torch.functional.einsum, torch.matmul, "bmm"}.intersection(left)


@settings(max_examples=20, deadline=None)
@given(
    axes=st.tuples(*[st.integers(2, 4)] * 3),
    outs=st.tuples(*[st.integers(2, 4)] * 3),
    order=st.permutations([0, 1, 2]),
    seed=st.integers(0, 100),
)
def test_a_grid_of_three_axes(
    axes: tuple[int, int, int], outs: tuple[int, int, int], order: list[int], seed: int
) -> None:
    """One matrix along each axis, for every index of the others; the axes in any order."""
    torch.manual_seed(seed)
    now, weights, equations = list(axes), [], []
    for axis in order:
        others = "".join(letter for place, letter in enumerate("abc") if place != axis)
        made = "abc".replace("abc"[axis], "z")
        equations.append(f"...abc,{others}z{'abc'[axis]}->...{made}")
        weights.append(torch.randn(*(n for place, n in enumerate(now) if place != axis), outs[axis], now[axis]))
        now[axis] = outs[axis]

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        z = x.unflatten(-1, axes)
        for equation, weight in zip(equations, weights, strict=True):
            z = torch.einsum(equation, z, weight)
        return torch.flatten(z, -3)

    arguments = [torch.randn(5, axes[0] * axes[1] * axes[2]), *weights]
    for argument in arguments:
        argument.requires_grad_()
    with only("kronecker"):
        fast = Rewritten(run)
        assert_like_eager(fast, run, arguments, torch.float32, torch.randn(5, outs[0] * outs[1] * outs[2]))
    factors: Any = [call.args[1] for call in fast.calls_of(OP)]
    products = sum(map(len, factors))
    assert products == 3 if order in ([0, 1, 2], [2, 1, 0]) else products >= 2


class Monarch(nn.Module):
    """torch-structured's MonarchLinear."""

    def __init__(self, in_features: int, out_features: int, blocks: int) -> None:
        super().__init__()
        self.inputs, self.outputs = -(-in_features // blocks), -(-out_features // blocks)
        self.in_features, self.out_features = in_features, out_features
        middle = min(self.inputs, self.outputs)
        self.first = nn.Parameter(torch.randn(blocks, middle, self.inputs) / self.inputs**0.5)
        self.second = nn.Parameter(torch.randn(blocks, self.outputs, middle) / middle**0.5)
        self.bias = nn.Parameter(torch.randn(out_features))

    def forward(self, x: Tensor) -> Tensor:
        more = self.inputs * self.first.shape[0] - self.in_features
        x = nn.functional.pad(x, (0, more)) if more else x
        result: Tensor = by_bmm(x, self.first, self.second)[..., : self.out_features] + self.bias
        return result


@pytest.mark.parametrize("sizes", [(32, 48), (30, 45), (47, 29)])
@pytest.mark.parametrize("then", ["aot_eager", "inductor"])
def test_a_layer_and_its_training_step(sizes: tuple[int, int], then: str) -> None:
    if then == "inductor" and sizes != (30, 45):
        return
    torch.manual_seed(0)
    layer, x = Monarch(*sizes, 4), torch.randn(2, 7, sizes[0])
    if min(-(-sizes[0] // 4), -(-sizes[1] // 4)) % 4:  # blocks of the middle that the second factor's do not divide
        layer.first = nn.Parameter(torch.randn(4, 8, -(-sizes[0] // 4)))
        layer.second = nn.Parameter(torch.randn(4, -(-sizes[1] // 4), 8))
    fast = Rewritten(layer, then=then)
    value, exact = fast(x), layer(x)
    torch.testing.assert_close(value, exact)
    gradients = [torch.autograd.grad(each.square().sum(), list(layer.parameters())) for each in (value, exact)]
    for mine, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, expected)
    (site,) = fast.sites
    assert site.status == "rewritten"
    (call,) = fast.calls_of(OP)
    assert call.args[3] == [sizes[1]]
    source: Any = call.args[0]
    assert source.op == "placeholder"  # neither padded nor reshaped


@pytest.mark.parametrize("form", sorted(FORMS))
def test_batches_of_any_size_take_one_graph(form: str) -> None:
    w1, w2 = torch.randn(4, 6, 5), torch.randn(3, 7, 8)
    fast = Rewritten(FORMS[form], then="aot_eager", dynamic=True)
    for rows in ((5, 3), (2, 8), (7, 4)):
        x = torch.randn(*rows, 20)
        torch._dynamo.mark_static(x, 2)
        torch._dynamo.mark_static(w1)
        torch._dynamo.mark_static(w2)
        torch.testing.assert_close(fast(x, w1, w2), FORMS[form](x, w1, w2))
    assert fast.statuses == ["rewritten"]


def test_autocast() -> None:
    w1, w2, x = torch.randn(4, 6, 5), torch.randn(3, 7, 8), torch.randn(9, 20)
    fast = Rewritten(by_einsum)
    with torch.autocast("cpu", torch.bfloat16):
        value, expected = fast(x, w1, w2), by_einsum(x, w1, w2)
    assert fast.statuses == ["rewritten"]
    assert value.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(value.float(), expected.float(), rtol=0.05, atol=0.1)


def test_nothing_is_kept_for_a_backward_that_does_not_come() -> None:
    w1, w2, x = torch.randn(4, 6, 5), torch.randn(3, 7, 8), torch.randn(9, 20, requires_grad=True)

    def form(x: Tensor, w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            unseen = by_bmm(x, w1, w2)
        return unseen, by_bmm(x, w1, w2)

    fast = Rewritten(form)
    fast(x, w1, w2)
    assert [call.args[4] for call in fast.calls_of(OP)] == [False, True]

"""Butterflies in every form are one op, their stages merged a few at a time, and compute what eager does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from structfly.lowering.kronecker.reference import FactorShape, kronecker_reference
from structfly.patterns.batched_chain.merging import grouped_shapes, merged, merged_shape
from tests.compiling import Rewritten
from tests.oracle import assert_like_eager
from tests.patterns.batched_chain.forms import only

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own deprecations
OP = torch.ops.structfly.kronecker_v3.default

# One stage: y (rows, blocks, 2, stride) and w (blocks, stride, 2, 2) give (rows, blocks, 2, stride).
Stage = Callable[[Tensor, Tensor], Tensor]


def by_sum(y: Tensor, w: Tensor) -> Tensor:
    """As the reference of the butterfly's authors."""
    return (w.permute(0, 2, 3, 1) * y.unsqueeze(2)).sum(dim=3)


def by_sum_of_the_other(y: Tensor, w: Tensor) -> Tensor:
    return torch.sum(y.transpose(2, 3)[:, :, :, None] * w, -1).transpose(2, 3)


def by_einsum(y: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("bsij,nbjs->nbis", w, y)


def by_bmm(y: Tensor, w: Tensor) -> Tensor:
    return (w @ y.transpose(2, 3).unsqueeze(-1)).squeeze(-1).transpose(2, 3)


def by_stack(y: Tensor, w: Tensor) -> Tensor:
    (a, b), (c, d) = ((w[:, :, i, j] for j in range(2)) for i in range(2))
    x0, x1 = y[:, :, 0], y[..., 1, :]
    return torch.stack([a * x0 + b * x1, x0 * c + x1 * d], 2)


def by_stack_of_parts(y: Tensor, w: Tensor) -> Tensor:
    a, b, c, d = w.flatten(2).unbind(-1)
    x0, x1 = y.unbind(2)
    return torch.stack((b * x1 + a * x0, c * x0 + d * x1), dim=-2)


def by_stack_of_selected(y: Tensor, w: Tensor) -> Tensor:
    x = [y.select(2, j) for j in range(2)]
    rows = [w.select(2, i) for i in range(2)]
    return torch.stack([rows[i][..., 0] * x[0] + rows[i][..., 1] * x[1] for i in range(2)], dim=2)


STAGES: Mapping[str, Stage] = {
    each.__name__: each
    for each in (by_sum, by_sum_of_the_other, by_einsum, by_bmm, by_stack, by_stack_of_parts, by_stack_of_selected)
}


def butterfly(x: Tensor, twiddle: Tensor, stage: Stage, increasing: bool) -> Tensor:
    """twiddle (log n, n / 2, 2, 2), strides increasing or decreasing."""
    count, rows, n = len(twiddle), x.shape[0], x.shape[-1]
    y = x
    for number in range(count):
        stride = 1 << (number if increasing else count - 1 - number)
        blocks = n // (2 * stride)
        y = stage(y.reshape(rows, blocks, 2, stride), twiddle[number].view(blocks, stride, 2, 2))
    return y.reshape(rows, n)


@settings(max_examples=40, deadline=None)
@given(
    form=st.sampled_from(sorted(STAGES)),
    count=st.integers(2, 6),
    increasing=st.booleans(),
    groups=st.integers(2, 6),
    rows=st.integers(1, 5),
    dtype=st.sampled_from((torch.float32, torch.float64, torch.bfloat16)),
    wanted=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 1000),
)
def test_value_and_gradients_are_eagers(
    form: str,
    count: int,
    increasing: bool,
    groups: int,
    rows: int,
    dtype: torch.dtype,
    wanted: tuple[bool, bool],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    n, groups = 1 << count, min(count, groups)
    arguments = [torch.randn(rows, n, dtype=dtype), torch.randn(count, n // 2, 2, 2, dtype=dtype) / 2**0.5]
    for argument, each in zip(arguments, wanted, strict=True):
        argument.requires_grad_(each)

    def run(x: Tensor, twiddle: Tensor) -> Tensor:
        return butterfly(x, twiddle, STAGES[form], increasing)

    name = "kronecker" if groups == count else f"kronecker of {groups}"
    with only(name):
        fast = Rewritten(run, then="aot_eager")
        assert_like_eager(fast, run, arguments, dtype, torch.randn(rows, n, dtype=dtype))
    assert [(site.status, site.candidate) for site in fast.sites] == [("rewritten", name)]
    (call,) = fast.calls_of(OP)
    factors: Any = call.args[1]
    assert len(factors) == groups


@given(
    across=st.integers(1, 3),
    along=st.integers(1, 3),
    rank=st.integers(1, 3),
    outer=st.integers(1, 3),
    inner=st.integers(1, 3),
    ends=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    later_is_wider=st.booleans(),
)
def test_two_factors_are_the_one_that_they_are_merged_to(
    across: int, along: int, rank: int, outer: int, inner: int, ends: tuple[int, int], later_is_wider: bool
) -> None:
    torch.manual_seed(0)
    takes, gives = ends
    if later_is_wider:
        right = FactorShape(inner, outer * across, rank * along, 1, takes, 1)
        left = FactorShape(along * inner, outer, gives, 1, across * rank, 1)
    else:
        right = FactorShape(along * inner, outer, across * rank, 1, takes, 1)
        left = FactorShape(inner, outer * across, gives, 1, rank * along, 1)
    assert right.features_out == left.features_in
    shape = merged_shape(right, left)
    assert shape is not None
    factors = [torch.randn(*each, dtype=torch.float64) for each in (right, left)]
    made = merged(*factors)
    assert made.shape == tuple(shape)
    x = torch.randn(4, right.features_in, dtype=torch.float64)
    torch.testing.assert_close(
        kronecker_reference(x, [made], left.features_out), kronecker_reference(x, factors, left.features_out)
    )


def test_factors_that_are_none_together() -> None:
    right = FactorShape(2, 3, 4, 1, 4, 1)
    assert merged_shape(right, FactorShape(3, 2, 4, 1, 4, 1)) is None  # neither a divides the other
    assert merged_shape(right, FactorShape(4, 1, 4, 1, 6, 1)) is not None
    assert merged_shape(right._replace(q=2, i=2), FactorShape(4, 1, 4, 1, 6, 1)) is None
    assert grouped_shapes([right, FactorShape(3, 2, 4, 1, 4, 1), right], 2) is None


class Butterfly(nn.Module):
    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.twiddle, self.stage = nn.Parameter(torch.randn(3, 4, 2, 2)), stage

    def forward(self, x: Tensor) -> Tensor:
        return butterfly(x, self.twiddle, self.stage, True)


def test_stages_in_which_something_else_is_read_are_left() -> None:
    products: list[Tensor] = []

    def noted_sum(y: Tensor, w: Tensor) -> Tensor:
        products.append(w.permute(0, 2, 3, 1) * y.unsqueeze(2))
        return products[-1].sum(dim=3)

    def noted_stack(y: Tensor, w: Tensor) -> Tensor:
        (a, b), (c, d) = ((w[:, :, i, j] for j in range(2)) for i in range(2))
        x0, x1 = y.unbind(2)
        products.append(a * x0)
        return torch.stack([products[-1] + b * x1, c * x0 + d * x1], 2)

    for stage in (noted_sum, noted_stack):

        class Noted(Butterfly):
            def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
                products.clear()
                return super().forward(x), *products

        layer, x = Noted(stage), torch.randn(3, 8)
        fast = Rewritten(layer)
        for mine, expected in zip(fast(x), layer(x), strict=True):
            torch.testing.assert_close(mine, expected)
        assert {site.status for site in fast.sites} == {"missed"}
        assert "between the products, is read elsewhere" in fast.sites[-1].reason


def test_elementwise_products_are_not_made_less_precise() -> None:
    x = torch.randn(3, 8)
    for stage in (by_sum, by_stack):
        layer = Butterfly(stage)
        torch.set_float32_matmul_precision("medium")
        try:
            fast = Rewritten(layer)
            torch.testing.assert_close(fast(x), layer(x))
        finally:
            torch.set_float32_matmul_precision("highest")
        assert "torch may make products of matrices in bf16" in fast.sites[0].reason
        fast = Rewritten(layer)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(fast(x), layer(x))
        assert "which autocast leaves alone" in fast.sites[0].reason

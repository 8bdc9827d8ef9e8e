"""What views do to axes: the same as to numbers, and the same whatever the sizes are."""

from __future__ import annotations

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

from structfly.patterns.batched_chain.axes import Axis, AxisError, AxisSplits, Dims, product_of, quotient, root_axes


@given(data=st.data())
def test_axes_follow_the_numbers(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.sampled_from((1, 2, 3, 4, 6)), min_size=1, max_size=4))
    x = torch.arange(torch.Size(shape).numel()).reshape(shape)
    root = root_axes(x)
    dims: Dims = root
    y, splits = x, AxisSplits()
    for _ in range(data.draw(st.integers(1, 5))):
        if data.draw(st.booleans()):
            order = data.draw(st.permutations(range(y.ndim)))
            y, dims = y.permute(order), tuple(dims[place] for place in order)
            continue
        first = data.draw(st.sampled_from([n for n in range(1, y.numel() + 1) if y.numel() % n == 0]))
        left = y.numel() // first
        second = data.draw(st.sampled_from([n for n in range(1, left + 1) if left % n == 0]))
        sizes = (first, second, left // second)
        y = y.reshape(sizes)
        try:
            dims = splits.reshaped(tuple(axis for dim in dims for axis in dim), tuple(map(sympy.Integer, sizes)))
        except AxisError:
            return
    assert [int(product_of(dim)) for dim in dims] == list(y.shape)
    axes = splits.refined(axis for dim in root for axis in dim)
    order = [axes.index(axis) for axis in splits.refined(axis for dim in dims for axis in dim)]
    assert sorted(order) == list(range(len(axes)))
    assert torch.equal(x.reshape([int(axis.size) for axis in axes]).permute(order).reshape(y.shape), y)


@pytest.mark.parametrize(
    ("before", "sizes"),
    [((4, 6), (3, 8)), ((3, 8), (2, 12)), ((8, 3), (12, 2)), ((6,), (4, 2)), ((2, 2), (2,)), ((2,), (2, 2))],
)
def test_a_reshape_that_takes_axes_apart(before: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    axes = tuple(axis for dim in root_axes(torch.empty(before)) for axis in dim)
    with pytest.raises(AxisError):
        AxisSplits().reshaped(axes, tuple(map(sympy.Integer, sizes)))


def test_sizes_that_vary() -> None:
    n, m = sympy.symbols("n m", positive=True, integer=True)
    assert quotient(12 * n * m, 4 * n) == 3 * m
    assert quotient(4 * n + 8, 4) == n + 2
    assert quotient(6 * n, sympy.Integer(4)) is None
    assert quotient(n, m) is None
    splits = AxisSplits()
    (rows,), (features,) = splits.reshaped((Axis(n * m * 8),), (n * m, sympy.Integer(8)))
    assert (rows.size, features.size) == (n * m, 8)
    (one, two) = splits.reshaped((rows,), (n, m))
    assert [axis.size for axis in one + two] == [n, m]
    with pytest.raises(AxisError):
        splits.reshaped((one[0],), (sympy.Integer(2), n / 2))

"""Conjugate gradients: the solution, how much it gains, and where it ends."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from structfly.patterns.conjugate_gradients import conjugate_gradients


def problem(size: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A positive definite matrix, what its product is to be, and where to start."""
    generator = torch.Generator().manual_seed(seed)
    mix, wanted, start = (torch.randn(size, n, generator=generator, dtype=torch.float64) for n in (size, 2, 2))
    return mix @ mix.t() + 0.1 * torch.eye(size, dtype=torch.float64), wanted, start


@given(size=st.integers(1, 6), steps=st.integers(0, 4), seed=st.integers(0, 20))
def test_gain_is_how_much_lower_the_function_is(size: int, steps: int, seed: int) -> None:
    matrix, wanted, start = problem(size, seed)

    def value(x: Tensor) -> float:
        return float((x * (matrix @ x)).sum() / 2 - (x * wanted).sum())

    found, gain = conjugate_gradients(
        lambda x: matrix @ x, wanted, start, lambda x: x / matrix.diagonal()[:, None], steps=steps, tolerance=1e-12
    )
    assert gain == pytest.approx(value(start) - value(found), rel=1e-6, abs=1e-9)
    assert gain > 0 or steps == 0


@given(size=st.integers(1, 4), seed=st.integers(0, 20))
def test_as_many_steps_as_unknowns_solve(size: int, seed: int) -> None:
    matrix, wanted, start = problem(size, seed)
    # Both columns together are one problem of 2 size unknowns, with size different eigenvalues: size steps.
    found, _ = conjugate_gradients(lambda x: matrix @ x, wanted, start, lambda x: x, steps=size, tolerance=0.0)
    torch.testing.assert_close(matrix @ found, wanted, rtol=1e-5, atol=1e-5)


def test_one_step_is_enough_for_the_best_preconditioner_and_is_the_last() -> None:
    matrix, wanted, start = problem(5, 0)
    calls = []

    def times(x: Tensor) -> Tensor:
        calls.append(x)
        return matrix @ x

    inverse = torch.linalg.inv(matrix)
    found, _ = conjugate_gradients(times, wanted, start, lambda x: inverse @ x, steps=9, tolerance=1e-9)
    torch.testing.assert_close(found, inverse @ wanted)
    assert len(calls) == 2  # of the start, and of one direction


def test_nothing_is_moved_along_what_costs_nothing() -> None:
    start = torch.ones(3, 1)
    found, gain = conjugate_gradients(torch.zeros_like, torch.ones(3, 1), start, lambda x: x, steps=3, tolerance=1e-3)
    assert torch.equal(found, start)
    assert gain == 0

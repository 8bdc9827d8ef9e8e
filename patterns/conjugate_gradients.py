"""Preconditioned conjugate gradients (Hestenes and Stiefel 1952), a few steps of them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Map = Callable[[Tensor], Tensor]


def conjugate_gradients(
    times: Map, wanted: Tensor, start: Tensor, preconditioned: Map, *, steps: int, tolerance: float
) -> tuple[Tensor, float]:
    """x near the solution of M x = ``wanted``, from ``start`` on, and by how much x M x / 2 - x wanted is lower there.

    Args:
        times: x to M x, with M symmetric and positive semidefinite; shapes are the caller's.
        preconditioned: x to P x, with P symmetric, positive definite and near M^-1.
        steps: at most.
        tolerance: ends where r P r, with r = ``wanted`` - M x, is at most this part of what it was at the start.
    """
    x, residual = start, wanted - times(start)
    direction = residual
    energy = first = gain = 0.0
    for step in range(steps):
        ahead = preconditioned(residual)
        before, energy = energy, float((residual * ahead).sum())
        first = first if step else energy
        if not energy > tolerance * first:
            break
        direction = ahead + energy / before * direction if step else ahead
        pushed = times(direction)
        curvature = float((direction * pushed).sum())
        if not curvature > 0:
            break
        length = energy / curvature
        x, residual, gain = x + length * direction, residual - length * pushed, gain + length * energy / 2
    return x, gain

"""The oracle: eager in float64, and the tolerance rule.

A result is right if its relative Frobenius error, and its largest relative row error, against eager in float64 are at
most eager's own in the same dtype plus one rounding of that dtype.  Where a test draws a handful of numbers eager's own
error is a matter of luck (it may be 0, or half of what another order of the same sum has), so small tests allow twice
eager's error and a few roundings; tests of some size allow eager's error and one.  The gradient of a vector or a
number, whatever sides of one it has besides, is made of sums that may all but cancel: its error is taken relative to
the value, where that is more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]

# Roundings allowed where a test draws a handful of numbers.
FEW = 8
# As many roundings of float32 as two of TF32, one of each operand of a product, which may be cut off there.
TF32 = 2 * 2**13


def in_float64(value: Any) -> Any:
    """The same value with floating-point tensors in float64, as fresh leaves."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def value_and_gradients(
    function: Callable[..., Tensor], arguments: Sequence[Any], upstream: Tensor | None = None
) -> tuple[Tensor, Gradients]:
    """The value of a function and its gradients with respect to every argument that requires one."""
    value = function(*arguments)
    leaves = [argument for argument in arguments if isinstance(argument, Tensor) and argument.requires_grad]
    if not leaves or not value.requires_grad:
        return value.detach(), ()
    seed = torch.ones_like(value) if upstream is None else upstream.to(value.dtype)
    return value.detach(), torch.autograd.grad(value, leaves, seed, allow_unused=True)


def errors(actual: Tensor, exact: Tensor, floor: float = 1e-300) -> tuple[float, float]:
    """Relative Frobenius error, and largest row error relative to the largest row norm; norms count as ``floor`` at
    least."""
    if exact.numel() == 0:
        return 0.0, 0.0
    reference = exact.reshape(exact.shape[0] if exact.ndim > 1 else 1, -1)
    difference = actual.double().reshape(reference.shape) - reference
    norm = reference.norm().clamp_min(floor)
    rows = reference.norm(dim=1).amax().clamp_min(floor)
    return (difference.norm() / norm).item(), (difference.norm(dim=1).amax() / rows).item()


def assert_as_accurate(
    actual: Tensor,
    eager: Tensor,
    exact: Tensor,
    dtype: torch.dtype,
    what: str,
    roundings: int = FEW,
    floor: float = 1e-300,
) -> None:
    """Hold ``actual`` to the tolerance rule; ``floor`` as in :func:`errors`."""
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.dtype == eager.dtype, f"{what}: {actual.dtype}, eager has {eager.dtype}"
    special = ~exact.isfinite()
    same = torch.where(special, actual.double(), 0.0).nan_to_num(nan=7.0, posinf=8.0, neginf=9.0)
    expected = torch.where(special, exact, 0.0).nan_to_num(nan=7.0, posinf=8.0, neginf=9.0)
    assert torch.equal(same, expected), f"{what}: infinities or NaNs differ"
    actual, eager, exact = (torch.where(special, 0.0, t.double()) for t in (actual, eager, exact))
    # float64 is its own oracle: both sides carry errors.
    allowance = (512 if dtype == torch.float64 else roundings) * torch.finfo(dtype).eps
    luck = 2.0 if roundings >= FEW else 1.0
    mine_theirs = zip(errors(actual, exact, floor), errors(eager, exact, floor), ("relative", "row"), strict=True)
    for mine, theirs, kind in mine_theirs:
        allowed = luck * theirs + allowance
        assert mine <= allowed, f"{what}: {kind} error {mine:.3g}, eager {theirs:.3g}, allowed {allowed:.3g}"


def assert_like_eager(
    fast: Callable[..., Tensor],
    function: Callable[..., Tensor],
    arguments: Sequence[Any],
    dtype: torch.dtype = torch.float32,
    upstream: Tensor | None = None,
    roundings: int = FEW,
) -> None:
    """Compare the value and every gradient of ``fast`` with those of ``function`` in float64."""
    value, gradients = value_and_gradients(fast, arguments, upstream)
    eager, eager_gradients = value_and_gradients(function, arguments, upstream)
    exact_value, exact_gradients = value_and_gradients(
        function,
        [in_float64(argument) for argument in arguments],
        None if upstream is None else upstream.double(),
    )
    assert_as_accurate(value, eager, exact_value, dtype, "value", roundings)
    finite = torch.where(exact_value.isfinite(), exact_value, 1.0)
    size = (finite if upstream is None else finite * upstream.double()).norm().item()
    for index, (mine, theirs, reference) in enumerate(zip(gradients, eager_gradients, exact_gradients, strict=True)):
        if reference is None or theirs is None:
            assert mine is None or not mine.any(), f"gradient {index} should be absent"
            continue
        assert mine is not None, f"gradient {index} is missing"
        floor = max(size, 1e-300) if reference.squeeze().ndim < 2 else 1e-300
        assert_as_accurate(mine, theirs, reference, dtype, f"gradient {index}", roundings, floor)

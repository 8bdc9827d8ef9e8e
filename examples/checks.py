"""Does a compiled training run agree with eager?  Each check measures its own tolerance, none is guessed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

BAND_FACTOR = 4.0


class Verdict(NamedTuple):
    """The outcome of one check: its name, whether it passed, and the numbers behind it."""

    name: str
    passed: bool
    detail: str


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference over that of ``exact``, in float64."""
    difference = torch.linalg.vector_norm(actual.double() - exact.double())
    return float(difference / torch.linalg.vector_norm(exact.double()))


def loss_error(eager: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """Eager's own relative error of the loss, over single tokens: that of their mean may vanish by luck."""
    return relative_error(eager["token_losses"], exact["token_losses"])


def check_first_step(
    run: Mapping[str, Tensor], eager: Mapping[str, Tensor], exact: Mapping[str, Tensor], *, unit: float
) -> list[Verdict]:
    """Hold the loss and every gradient to at most twice eager's own error against float64, plus one rounding.

    Two: the run's roundings are as large as eager's, but not the same ones.

    Args:
        run: "loss" and "gradient.*" of the run to judge.
        eager: the same of the eager run in the same dtype, and "token_losses".
        exact: the same of an eager run in float64.
        unit: largest relative error of one rounding in the dtype of the runs.
    """
    error = relative_error(run["loss"], exact["loss"])
    own = loss_error(eager, exact)
    bound = 2 * own + unit
    detail = f"relative error {error:.2e} against float64, allowed {bound:.2e} (eager's tokens {own:.2e})"
    loss = Verdict("first loss", error <= bound, detail)

    names = sorted(name for name in exact if name.startswith("gradient."))
    missing = [name for name in names if name not in run]
    if missing:
        return [loss, Verdict("first gradients", False, f"missing: {', '.join(missing)}")]
    errors = {name: relative_error(run[name], exact[name]) for name in names}
    bounds = {name: 2 * relative_error(eager[name], exact[name]) + unit for name in names}
    worst = max(names, key=lambda name: errors[name] / bounds[name] if errors[name] == errors[name] else math.inf)
    detail = (
        f"{len(names)} tensors; nearest its limit is {worst.removeprefix('gradient.')}: "
        f"relative error {errors[worst]:.2e}, allowed {bounds[worst]:.2e}"
    )
    return [loss, Verdict("first gradients", all(errors[name] <= bounds[name] for name in names), detail)]


def band(eager: Sequence[float], perturbed: Sequence[float], *, own_error: float, unit: float) -> list[float]:
    """How far a loss curve may stray from eager's at each step.

    Training amplifies rounding, so equal programs drift apart.  How fast is measured: ``perturbed`` is an
    eager run whose initial parameters were moved by one rounding.  The band is ``BAND_FACTOR`` times the
    largest distance between the two eager runs so far; the factor allows for that run being a single draw,
    and for a backend's roundings recurring in every step where the perturbation happens once.  Added to it
    is what two right evaluations of one loss may differ by: eager's own error, and what
    :func:`check_first_step` allows.
    """
    distances = [abs(a - b) for a, b in zip(eager, perturbed, strict=True)]
    evaluation = own_error + (2 * own_error + unit)
    return [
        BAND_FACTOR * distance + evaluation * abs(loss)
        for distance, loss in zip(accumulate(distances, max), eager, strict=True)
    ]


def check_curve(losses: Sequence[float], eager: Sequence[float], allowed: Sequence[float]) -> Verdict:
    """Hold every step's loss to the band around eager's."""
    distances = [abs(a - b) for a, b in zip(losses, eager, strict=True)]
    outside = [step for step, (d, limit) in enumerate(zip(distances, allowed, strict=True)) if not d <= limit]
    shares = [d / limit for d, limit in zip(distances, allowed, strict=True)]
    detail = f"uses at most {100 * max(shares):.0f}% of the band"
    if outside:
        step = outside[0]
        detail = (
            f"leaves the band at step {step}: loss {losses[step]:.6f}, eager {eager[step]:.6f}, "
            f"allowed distance {allowed[step]:.2e}; {len(outside)} steps outside"
        )
    return Verdict("loss curve", not outside, detail)

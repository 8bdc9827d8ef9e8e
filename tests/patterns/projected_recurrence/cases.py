"""What tests of recurrences with their projections share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from structfly.lowering.linear_recurrence.arguments import ProjectedArguments
from structfly.lowering.linear_recurrence.projected_op import PROJECTED
from structfly.ops import joint_linear_recurrence
from structfly.records import SiteReport
from tests.compiling import Rewritten

BATCH, STEPS, INPUTS, UNITS = 2, 7, 3, 4
POOLING: dict[str, Any] = {"complement": True, "gate_activation": "sigmoid", "input_activation": "tanh"}


def arguments(
    order: str = "zfo", *, steps: int = STEPS, inputs: int = INPUTS, units: int = UNITS, dtype: torch.dtype
) -> list[Tensor]:
    """x, a weight and a bias."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((BATCH, steps, inputs), (len(order) * units, inputs), (len(order) * units,))
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def own(fast: Rewritten) -> list[SiteReport]:
    """The reports of this rule."""
    return [site for site in fast.sites if site.rule == "projected_recurrence"]


def calls_made(fast: Rewritten) -> list[ProjectedArguments]:
    """Their arguments, nodes in the place of tensors."""
    given: list[Any] = [node.args for node in fast.calls_of(PROJECTED)]
    return [ProjectedArguments(*each) for each in given]


def call_of(fast: Rewritten) -> ProjectedArguments:
    (call,) = calls_made(fast)
    return call


def without_gradients(function: Callable[..., Any], *given: Any) -> Any:
    with torch.no_grad():
        return function(*given)


def pooled(y: Tensor, order: str = "zfo", **options: Any) -> Tensor:
    return joint_linear_recurrence(y, order, **{**POOLING, **options})[0]

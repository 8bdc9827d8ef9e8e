"""``structfly::projected_linear_recurrence_v1``: gated recurrences of a linear map, for calls that nobody
differentiates.

A backward would take what the map makes, which is not written.  Autocast leaves the op alone.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from structfly.compat import register_autograd
from structfly.errors import UnsupportedError
from structfly.lowering.autocast import without_autocast
from structfly.lowering.linear_recurrence import projected_steps
from structfly.lowering.linear_recurrence.arguments import (
    PROJECTED_ARGUMENTS,
    PROJECTED_NAME,
    PROJECTED_RESULTS,
    ProjectedArguments,
)
from structfly.lowering.linear_recurrence.op import DEVICES
from structfly.lowering.replay.replayed import replayed
from structfly.lowering.vmap import one_by_one

torch.library.define(PROJECTED_NAME, f"({PROJECTED_ARGUMENTS}) -> ({PROJECTED_RESULTS})")
PROJECTED: Any = getattr(torch.ops.structfly, PROJECTED_NAME.removeprefix("structfly::")).default


def _run(*given: Any) -> tuple[Tensor, Tensor]:
    call = ProjectedArguments(*given)
    with without_autocast(call.inputs.device):
        return projected_steps.forward(call)


def _fake(*given: Any) -> tuple[Tensor, Tensor]:
    call = ProjectedArguments(*given)
    final = call.inputs.new_empty(call.inputs.shape[0], call.width, dtype=call.state_dtype)
    return call.empty_output(), final


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    pass


def _refuse(ctx: Any, needed: Any, *upstream: Any) -> NoReturn:
    raise UnsupportedError(
        "a gradient is asked for of projected_linear_recurrence, which keeps nothing for a backward; call it under "
        "torch.no_grad(), or structfly.ops.joint_linear_recurrence of the linear map, which has a gradient"
    )


torch.library.impl(PROJECTED_NAME, DEVICES)(replayed(_run))
torch.library.register_fake(PROJECTED_NAME, _fake)
register_autograd(PROJECTED, _refuse, _keep_nothing)
torch.library.register_vmap(PROJECTED_NAME, one_by_one(PROJECTED))

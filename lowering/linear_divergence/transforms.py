"""How the op behaves under autocast and vmap."""

from __future__ import annotations

import torch

from structfly.lowering.head.autocast import register_autocast
from structfly.lowering.head.linear import DIFFERENTIABLE
from structfly.lowering.linear_divergence.arguments import BACKWARD_NAME, NAME, Arguments
from structfly.lowering.linear_divergence.op import linear_divergence
from structfly.lowering.vmap import one_by_one

_MULTIPLIED = (*DIFFERENTIABLE, "teacher_x", "teacher_weight", "teacher_bias")

register_autocast(NAME.removeprefix("structfly::"), Arguments, _MULTIPLIED, linear_divergence)
torch.library.register_vmap(NAME, one_by_one(torch.ops.structfly.linear_divergence_v1.default))
torch.library.register_vmap(BACKWARD_NAME, one_by_one(torch.ops.structfly.linear_divergence_backward_v1.default))

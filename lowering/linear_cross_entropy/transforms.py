"""How the op behaves under autocast and vmap."""

from __future__ import annotations

import torch

from structfly.lowering.head.autocast import register_autocast
from structfly.lowering.head.linear import DIFFERENTIABLE
from structfly.lowering.linear_cross_entropy.arguments import BACKWARD_NAME, NAME, Arguments
from structfly.lowering.linear_cross_entropy.op import linear_cross_entropy
from structfly.lowering.vmap import one_by_one

register_autocast(NAME.removeprefix("structfly::"), Arguments, DIFFERENTIABLE, linear_cross_entropy)
torch.library.register_vmap(NAME, one_by_one(torch.ops.structfly.linear_cross_entropy_v4.default))
torch.library.register_vmap(BACKWARD_NAME, one_by_one(torch.ops.structfly.linear_cross_entropy_backward_v4.default))

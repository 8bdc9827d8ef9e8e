"""How the op behaves under autocast and vmap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from structfly.lowering.linear_divergence.arguments import BACKWARD_NAME, DEVICES, DIFFERENTIABLE, NAME, Arguments
from structfly.lowering.linear_divergence.op import linear_divergence
from structfly.lowering.vmap import one_by_one

_AUTOCAST = torch.library.Library("structfly", "FRAGMENT")
_MULTIPLIED = (*DIFFERENTIABLE, "teacher_x", "teacher_weight", "teacher_bias")


def _register_autocast(device: str) -> None:
    """Cast what the linears multiply to the autocast dtype, as autocast does for ``linear``, where the call asks."""

    def autocast(*arguments: Any) -> tuple[Tensor, ...]:
        call = Arguments(*arguments)
        dtype = torch.get_autocast_dtype(device)

        def cast(tensor: Tensor | None) -> Tensor | None:
            return tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)

        if call.autocast:
            inputs: dict[str, Any] = {name: cast(getattr(call, name)) for name in _MULTIPLIED}
            call = call._replace(**inputs)
        with torch.autocast(device, enabled=False):
            return linear_divergence(*call)

    _AUTOCAST.impl("linear_divergence_v1", autocast, f"Autocast{device.upper()}")


for _device in DEVICES:
    _register_autocast(_device)


torch.library.register_vmap(NAME, one_by_one(torch.ops.structfly.linear_divergence_v1.default))
torch.library.register_vmap(BACKWARD_NAME, one_by_one(torch.ops.structfly.linear_divergence_backward_v1.default))

"""How the op behaves under autocast and vmap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from structfly.lowering.linear_cross_entropy.arguments import (
    BACKWARD_NAME,
    DEVICES,
    DIFFERENTIABLE,
    NAME,
    Arguments,
)
from structfly.lowering.linear_cross_entropy.op import linear_cross_entropy
from structfly.lowering.vmap import one_by_one

_AUTOCAST = torch.library.Library("structfly", "FRAGMENT")


def _register_autocast(device: str) -> None:
    """Cast what the linear multiplies to the autocast dtype, as autocast does for ``linear``, where the call asks."""

    def autocast(*arguments: Any) -> tuple[Tensor, ...]:
        call = Arguments(*arguments)
        dtype = torch.get_autocast_dtype(device)

        def cast(tensor: Tensor | None) -> Tensor | None:
            return tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)

        if call.autocast:
            inputs: dict[str, Any] = {name: cast(getattr(call, name)) for name in DIFFERENTIABLE}
            call = call._replace(**inputs)
        with torch.autocast(device, enabled=False):
            return linear_cross_entropy(*call)

    _AUTOCAST.impl("linear_cross_entropy_v2", autocast, f"Autocast{device.upper()}")


for _device in DEVICES:
    _register_autocast(_device)


torch.library.register_vmap(NAME, one_by_one(torch.ops.structfly.linear_cross_entropy_v2.default))
torch.library.register_vmap(BACKWARD_NAME, one_by_one(torch.ops.structfly.linear_cross_entropy_backward_v2.default))

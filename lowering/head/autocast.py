"""How the ops of heads behave under autocast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from structfly.lowering.head.linear import DEVICES

_LIBRARY = torch.library.Library("structfly", "FRAGMENT")


def register_autocast(name: str, arguments: Any, multiplied: Sequence[str], op: Callable[..., Any]) -> None:
    """Cast what a head's linears multiply to the autocast dtype, as autocast does for ``linear``, where a call asks.

    Args:
        name: of the op, without its namespace.
        arguments: the op's arguments, a named tuple with ``autocast``.
        multiplied: those that are cast.
        op: the op itself.
    """
    for device in DEVICES:
        _LIBRARY.impl(name, _rule(device, arguments, multiplied, op), f"Autocast{device.upper()}")


def _rule(device: str, arguments: Any, multiplied: Sequence[str], op: Callable[..., Any]) -> Callable[..., Any]:
    def autocast(*values: Any) -> Any:
        call = arguments(*values)
        dtype = torch.get_autocast_dtype(device)

        def cast(tensor: Tensor | None) -> Tensor | None:
            return tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)

        if call.autocast:
            call = call._replace(**{name: cast(getattr(call, name)) for name in multiplied})
        with torch.autocast(device, enabled=False):
            return op(*call)

    return autocast

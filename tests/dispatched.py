"""Which ops run, and with which arguments."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Dispatched(TorchDispatchMode):
    """Notes every op that runs under it, autograd's among them, and its arguments."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((func, args))
        return func(*args, **(kwargs or {}))

    @property
    def names(self) -> list[str]:
        """Of all ops, overloads apart."""
        return [func.overloadpacket.__name__ for func, _ in self.calls]

    def arguments_of(self, ops: Container[Any]) -> list[tuple[Any, ...]]:
        """Of the calls of some ops."""
        return [args for func, args in self.calls if func in ops]

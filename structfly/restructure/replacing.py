"""One module in the place of another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the one of this name, everywhere that one stands."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for own, child in list(parent._modules.items()):
            if child is old:
                parent._modules[own] = module


@contextmanager
def replaced(model: nn.Module, name: str, module: nn.Module) -> Iterator[None]:
    """``module`` stands there within the context."""
    old = model.get_submodule(name)
    replace_module(model, name, module)
    try:
        yield
    finally:
        replace_module(model, name, old)

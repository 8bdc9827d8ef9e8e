"""Which layers' weights a model reads otherwise than by calling the layer: nothing but the layer could be replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from structfly.restructure.layers import Layer
from structfly.rewriter.evaluating import evaluating, sampling


def read_elsewhere(model: nn.Module, layers: Mapping[str, Layer], run: Callable[[], object]) -> set[str]:
    """The names of the layers of which ``run()``, a forward pass, reads the weight outside the layer's own call."""
    names = {id(layer.module.weight): name for name, layer in layers.items()}
    inside: list[str] = []
    handles = []
    for name, layer in layers.items():
        handles.append(layer.module.register_forward_pre_hook(lambda *_, name=name: inside.append(name)))
        handles.append(layer.module.register_forward_hook(lambda *_: inside.pop() and None))
    try:
        reads = _Reads(names, inside)
        with evaluating(model), torch.no_grad(), sampling(model, 0), reads:
            run()
    finally:
        for handle in handles:
            handle.remove()
    return reads.found


class _Reads(TorchFunctionMode):
    """Notes reads of tensors by anything that is not inside the layer they belong to."""

    def __init__(self, names: Mapping[int, str], inside: list[str]) -> None:
        super().__init__()
        self.names, self.inside = names, inside
        self.found: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for tensor in _tensors((args, kwargs or {})):
            name = self.names.get(id(tensor))
            if name is not None and name not in self.inside:
                self.found.add(name)
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)

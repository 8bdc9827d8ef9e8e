"""Which layers of a model may be restructured, and why others are left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from structfly.compat import storage_key, wrapper_subclass
from structfly.errors import ArgumentError
from structfly.patterns.linear.heads import is_head
from structfly.patterns.structure import StructuredLinear
from structfly.records.layer import LayerSizes

_Kind = Literal["linear", "transformers' Conv1D", "1x1 convolution"]


@dataclass(frozen=True)
class Layer:
    """A layer that multiplies by one weight.

    Attributes:
        name: its qualified name.
        module: the layer.
        kind: what it is.
    """

    name: str
    module: nn.Module
    kind: _Kind

    @property
    def weight(self) -> Tensor:
        """(out, in), a view of the layer's own."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        if self.kind == "linear":
            return weight
        return weight.t() if self.kind == "transformers' Conv1D" else weight.flatten(1)

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self.module.bias  # type: ignore[assignment]
        return bias

    @property
    def sizes(self) -> LayerSizes:
        out_features, in_features = self.weight.shape
        return LayerSizes(in_features, out_features)

    def rows(self, value: Tensor) -> Tensor:
        """An input or output as (tokens, features)."""
        value = value.movedim(-3, -1) if self.kind == "1x1 convolution" else value
        return value.reshape(-1, value.shape[-1])

    def as_linear(self) -> nn.Linear:
        """A linear that shares this layer's weight and bias."""
        linear = nn.Linear(*self.sizes, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight.detach(), requires_grad=self.module.weight.requires_grad)  # type: ignore[arg-type]
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach(), requires_grad=self.bias.requires_grad)
        return linear.train(self.module.training)

    def in_place_of(self, layer: StructuredLinear) -> nn.Module:
        """What stands where this layer stood."""
        return Pointwise(layer) if self.kind == "1x1 convolution" else layer


class Pointwise(nn.Module):
    """A layer over the channels of (*, channels, height, width): a 1x1 convolution."""

    def __init__(self, layer: StructuredLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """(*, out, height, width) of (*, in, height, width)."""
        y: Tensor = self.layer(x.movedim(-3, -1))
        return y.movedim(-1, -3)


def find_layers(
    model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] | None = None
) -> tuple[dict[str, Layer], dict[str, str]]:
    """The layers that may be restructured by name, and of the other linear ones why not.

    Args:
        include, exclude: globs of qualified names; without ``exclude`` the heads are excluded: those that
            :func:`~structfly.patterns.linear.heads.is_head` knows, and what a transformers model gives as its output
            embeddings.

    Raises:
        ArgumentError: a glob matches the name of no linear layer.
    """
    heads = {id(_output_embeddings(model))} if exclude is None else set()
    uses = _uses_of_weights(model)
    layers: dict[str, Layer] = {}
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, StructuredLinear):
            left[name] = "it is structured already"
        kind = _kind_of(module)
        if kind is None:
            if isinstance(module, nn.Linear):
                left[name] = f"it is a {type(module).__name__}, not a plain nn.Linear"
            continue
        layer = Layer(name, module, kind)
        reason = _why_left(model, layer, uses) if name else "it is the whole model; put it into a torch.nn.Sequential"
        if exclude is None and (id(module) in heads or is_head(name)):
            reason = "it is the head, which is excluded by default"
        elif any(fnmatchcase(name, pattern) for pattern in exclude or ()):
            reason = "it is excluded"
        elif not any(fnmatchcase(name, pattern) for pattern in include):
            reason = "it is not included"
        if reason:
            left[name] = reason
        else:
            layers[name] = layer
    check_globs("include", include, (*layers, *left))
    check_globs("exclude", exclude or (), (*layers, *left))
    return layers, left


def check_globs(argument: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    """Raise ArgumentError for a pattern that matches none of the names: it is probably misspelt."""
    names = list(names)
    for pattern in patterns:
        if names and not any(fnmatchcase(name, pattern) for name in names):
            raise ArgumentError(f"{argument} has {pattern!r}, which matches none of the layers {', '.join(names)}")


def _kind_of(module: nn.Module) -> _Kind | None:
    if type(module) is nn.Linear:
        return "linear"
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and isinstance(module.weight, Tensor):
        return "transformers' Conv1D"
    if type(module) is nn.Conv2d and module.kernel_size == (1, 1) and module.groups == 1:
        plain = module.stride == (1, 1) and module.padding in ((0, 0), "valid", "same")
        return "1x1 convolution" if plain else None
    return None


def _why_left(model: nn.Module, layer: Layer, uses: Counter[int]) -> str:
    weight: Any = layer.module.weight
    parent_name, _, own_name = layer.name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if parametrize.is_parametrized(layer.module):
        return "its weight is parametrised; remove the parametrisation first"
    if wrapper_subclass(weight):
        return f"its weight is a {wrapper_subclass(weight)}, such as quantisation makes"
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        return f"its weight is {weight.dtype}"
    if own_name == "base_layer" and any("lora" in name for name, _ in parent.named_modules()):
        return "an adapter is wrapped around it; merge the adapter first"
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weight directly"
    if uses[storage_key(weight)] > 1:
        return "its weight is shared with another module"
    return ""


def _uses_of_weights(model: nn.Module) -> Counter[int]:
    """How many parameters of modules lie in each storage; a module that stands in several places counts once."""
    return Counter(
        storage_key(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None and type(parameter.data) is torch.Tensor
    )


def _output_embeddings(model: nn.Module) -> object:
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None

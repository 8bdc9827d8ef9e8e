"""Restructured models on disk: the structures as JSON beside the weights as safetensors."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from structfly.errors import PlanError
from structfly.patterns.structure import StructuredLinear
from structfly.restructure.apply import planned_layers
from structfly.restructure.layers import Pointwise
from structfly.restructure.plan import Plan, PlannedLayer
from structfly.restructure.replacing import replace_module

_PLAN, _WEIGHTS = "structfly.json", "model.safetensors"


def save_pretrained(model: nn.Module, folder: Path | str) -> None:
    """Write what ``model``'s layers are made of, and its state, into ``folder``: ``structfly.json`` is a
    :class:`~structfly.restructure.plan.Plan`, ``model.safetensors`` the state."""
    from safetensors.torch import save_model

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    structured = {
        name: PlannedLayer(in_features=m.in_features, out_features=m.out_features, structure=m.structure)
        for name, m in structured_layers(model).items()
    }
    Plan(layers=structured, strategy="saved").save(folder / _PLAN)
    save_model(model, str(folder / _WEIGHTS))


def from_pretrained(model: nn.Module, folder: Path | str, *, device: torch.device | str | None = None) -> nn.Module:
    """Turn ``model``, a fresh one of the dense architecture, into the one that was saved; in place, and returned.

    Args:
        model: its weights do not matter, and may be on the meta device where all its buffers are saved.
        folder: of :func:`save_pretrained`.
        device: where the model is put; None leaves it where it is, or if that is the meta device puts it on the CPU.

    Raises:
        PlanError: the folder holds no such model, or one of another architecture.
    """
    from safetensors.torch import load_model

    folder = Path(folder)
    for name in (_PLAN, _WEIGHTS):
        if not (folder / name).is_file():
            raise PlanError(f"{folder} has no {name}; give a folder that save_pretrained has written")
    for layer, structure in planned_layers(model, Plan.load(folder / _PLAN)):
        made = StructuredLinear(
            structure, *layer.sizes, layer.bias is not None, device="meta", dtype=layer.weight.dtype
        ).to_empty(device=device or layer.weight.device)
        replace_module(model, layer.name, layer.in_place_of(made.train(layer.module.training)))
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device=device or "cpu")
    elif device is not None:
        model.to(device)
    missing, unexpected = load_model(model, str(folder / _WEIGHTS), strict=False)
    if missing or unexpected:
        raise PlanError(
            f"{folder} is of another model: it lacks {sorted(missing)} and has {sorted(unexpected)} besides"
        )
    return model


def structured_layers(model: nn.Module) -> dict[str, StructuredLinear]:
    """The structured layers by the name of the layer that each replaced."""
    found: dict[str, StructuredLinear] = {}
    inside = {id(module.layer) for module in model.modules() if isinstance(module, Pointwise)}
    for name, module in model.named_modules():
        if isinstance(module, Pointwise):
            found[name] = module.layer
        elif isinstance(module, StructuredLinear) and id(module) not in inside:
            found[name] = module
    return found

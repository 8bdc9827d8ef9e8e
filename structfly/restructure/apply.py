"""``apply_``: from a plan to a model."""

from __future__ import annotations

from collections.abc import Mapping

from rich.progress import track
from torch import nn

from structfly.errors import PlanError
from structfly.patterns.structure import Structure, StructuredLinear
from structfly.records.layer import NO_STATISTICS, LayerStatistics
from structfly.restructure.layers import Layer, find_layers
from structfly.restructure.plan import Plan
from structfly.restructure.replacing import replace_module


def apply_(
    model: nn.Module,
    plan: Plan,
    *,
    statistics: Mapping[str, LayerStatistics] | None = None,
    progress: bool = False,
) -> None:
    """Restructure ``model``, in place, as ``plan`` says.

    Args:
        statistics: of the layers by name, for the projection; without them it is that of the weights alone.

    Raises:
        PlanError: the plan names a layer that the model does not have, or has with other sizes; nothing was changed.
    """
    known, made = statistics or {}, {}
    for layer, structure in track(planned_layers(model, plan), "restructuring", disable=not progress):
        linear = layer.as_linear()
        structured = StructuredLinear.from_linear(linear, structure, known.get(layer.name, NO_STATISTICS))
        made[layer.name] = layer.in_place_of(structured)
    for name, module in made.items():
        replace_module(model, name, module)


def planned_layers(model: nn.Module, plan: Plan) -> list[tuple[Layer, Structure]]:
    """The layers of ``model`` that ``plan`` restructures, with what each becomes.

    Raises:
        PlanError: the model has no such layer, or one of other sizes.
    """
    layers, left = find_layers(model, exclude=())
    found = []
    for name, planned in plan.layers.items():
        if planned.structure is None:
            continue
        if name not in layers or layers[name].sizes != planned.sizes:
            there = str(layers[name].sizes) if name in layers else left.get(name, "there is no such layer")
            raise PlanError(f"the plan restructures {name!r} of {planned.sizes}; in this model: {there}")
        found.append((layers[name], planned.structure))
    return found

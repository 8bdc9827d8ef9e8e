"""``restructure_`` and ``apply_``: from a budget to a plan, and from a plan to a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from rich.progress import track
from torch import nn

from structfly.config.budget import Budget
from structfly.errors import ArgumentError, PlanError
from structfly.lowering.device_profile import device_profile
from structfly.patterns.structure import Structure, StructuredLinear
from structfly.patterns.structures import OFFERED, STRUCTURES
from structfly.records.layer import NO_STATISTICS, LayerStatistics
from structfly.restructure.allocation import STRATEGIES, Allocation, dense_totals
from structfly.restructure.candidates import Candidate, Conditions, candidates_of
from structfly.restructure.layers import Layer, find_layers
from structfly.restructure.measuring import Loss
from structfly.restructure.plan import Measured, Plan, PlannedLayer
from structfly.restructure.reads import read_elsewhere
from structfly.restructure.refinement import refined
from structfly.restructure.replacing import replace_module
from structfly.rewriter.sensitivity import Losses, Watched, measure_statistics


def restructure_(
    model: nn.Module,
    budget: Budget,
    *,
    calibration: Iterable[Any] | None = None,
    loss_fn: Losses | None = None,
    measure: bool = True,
    refine: int = 0,
    structures: Sequence[str] = OFFERED,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] | None = None,
    overrides: Mapping[str, Sequence[str]] | None = None,
    strategy: str = "solver",
    sensitivity: Literal["fisher", "inputs"] = "fisher",
    tokens: int | None = None,
    seed: int = 0,
    progress: bool = True,
    resume: Path | str | None = None,
) -> Plan:
    """Replace linear layers of ``model``, in place, by structured ones within ``budget``.

    Do it before an optimizer is built.  Without calibration data losses are predicted, and weights projected, by the
    weights alone: in the squared Frobenius norm of their change.

    Args:
        model: any module; its nn.Linear, transformers' Conv1D and 1x1 convolutions may be replaced.
        budget: what those may cost together.
        calibration: batches, whatever ``loss_fn`` takes.
        loss_fn: (model, batch) -> the losses of the batch's independent terms (n,), or their mean (); where there are
            no labels, a :class:`~structfly.restructure.distillation.Distillation`.
        measure: whether the loss on the calibration data is measured before and after; the batches are held for it.
        refine: of how many candidates of each layer the loss is measured, with that layer alone replaced, to correct
            what is predicted of the layer's others.
        structures: names of those to offer, of :data:`~structfly.patterns.structures.STRUCTURES`.
        include, exclude: globs of qualified names; without ``exclude`` heads are left dense.
        overrides: globs of qualified names, each with the names of the structures offered there; the last that matches
            counts, and an empty list leaves a layer dense.
        strategy: "solver", or a rule to compare with: "uniform" shares, "pixelfly" (Pixelated Butterfly's shares by
            compute) or "gblr" (one threshold for all layers); the last two need those structures to be offered.
        sensitivity: what calibration tells of a change of a layer's output: "fisher", how much it costs in each
            direction (K-FAC), or "inputs", no more than how large it is.
        tokens: of a forward pass, for FLOPs, memory and time; None for as many as a calibration batch has, else 4096.
        seed: of the labels that ``loss_fn`` samples.
        progress: whether bars are shown.
        resume: a file that keeps the statistics of calibration, and beside it one with what ``refine`` measured; a run
            of the same model and data that was stopped goes on from them.

    Returns:
        the plan, which says what each layer became.

    Raises:
        ConfigError: the budget is none.
        PlanError: the budget cannot be kept; the message says what can.
        ArgumentError: an argument is wrong, or no layer is left to restructure.
    """
    offered = _structures(structures)
    if strategy not in STRATEGIES:
        raise ArgumentError(f"strategy is {strategy!r}; allowed: {', '.join(STRATEGIES)}")
    if sensitivity not in ("fisher", "inputs"):
        raise ArgumentError(f"sensitivity is {sensitivity!r}; allowed: fisher, inputs")
    if (calibration is None) != (loss_fn is None):
        raise ArgumentError("calibration and loss_fn go together; give both, or neither")
    layers, left = find_layers(model, include, exclude)
    statistics = dict.fromkeys(layers, NO_STATISTICS)
    seen, loss = 4096, None
    if calibration is not None and loss_fn is not None:
        batches = list(calibration)
        if batches:
            elsewhere = read_elsewhere(model, layers, lambda: loss_fn(model, batches[0]))
            left |= dict.fromkeys(elsewhere, "its weight is read by something else than the layer")
            layers = {name: each for name, each in layers.items() if name not in elsewhere}
        watched = {
            name: Watched(each.module, *each.sizes, each.rows, each.bias is not None) for name, each in layers.items()
        }
        statistics = measure_statistics(
            model,
            watched,
            batches,
            loss_fn,
            seed=seed,
            progress=progress,
            resume=None if resume is None else Path(resume),
        )
        if sensitivity == "inputs":
            statistics = {name: replace(each, output_fisher=None) for name, each in statistics.items()}
        left |= {name: "no calibration loss depends on it" for name in layers if name not in statistics}
        layers = {name: each for name, each in layers.items() if name in statistics}
        seen = max((each.tokens for each in statistics.values()), default=0) // max(len(batches), 1)
        loss = Loss(model, batches, loss_fn, seed) if measure or refine else None
    if not layers:
        raise ArgumentError(f"no layer is left to restructure; left: {left or 'the model has no linear layers'}")
    conditions = Conditions(tokens or max(1, seen), device_profile(next(iter(layers.values())).weight.device))
    menus: dict[str, list[Candidate]] = {}
    for name, layer in track(layers.items(), "candidates", disable=not progress):
        menus[name] = candidates_of(layer, _offered_to(name, offered, overrides), conditions, statistics[name])
    if refine and loss is not None:
        beside = None if resume is None else Path(f"{resume}.refinement.json")
        menus = refined(model, layers, menus, statistics, loss, refine, progress=progress, resume=beside)
    totals = dense_totals(menus, list(budget.limits))
    limits = {resource: limit.of(totals[resource]) for resource, limit in budget.limits.items()}
    allocation = STRATEGIES[strategy](menus, budget, limits)
    plan = _plan(layers, menus, allocation, left, strategy, budget, limits, conditions.tokens)
    before = loss.of(model) if loss is not None else None
    apply_(model, plan, statistics=statistics, progress=progress)
    if loss is None or before is None:
        return plan
    return plan.model_copy(update={"measured": Measured(dense=before, structured=loss.of(model))})


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
    layers, left = find_layers(model, exclude=())
    for name, planned in plan.layers.items():
        if planned.structure is None:
            continue
        if name not in layers:
            raise PlanError(
                f"the plan restructures {name!r}, which cannot be: {left.get(name, 'there is no such layer')}"
            )
        if layers[name].sizes != planned.sizes:
            raise PlanError(f"{name!r} is {layers[name].sizes}; the plan is for {planned.sizes}")
    chosen = {name: planned.structure for name, planned in plan.layers.items() if planned.structure is not None}
    made: dict[str, nn.Module] = {}
    for name, structure in track(chosen.items(), "restructuring", disable=not progress):
        layer = layers[name]
        known = NO_STATISTICS if statistics is None else statistics.get(name, NO_STATISTICS)
        made[name] = layer.in_place_of(StructuredLinear.from_linear(layer.as_linear(), structure, known))
    for name, module in made.items():
        replace_module(model, name, module)


def _structures(names: Sequence[str]) -> list[type[Structure]]:
    for name in names:
        if name not in STRUCTURES:
            raise ArgumentError(f"there is no structure {name!r}; there are {', '.join(STRUCTURES)}")
    return [each for name, each in STRUCTURES.items() if name in names]


def _offered_to(
    name: str, offered: Sequence[type[Structure]], overrides: Mapping[str, Sequence[str]] | None
) -> list[type[Structure]]:
    found = list(offered)
    for pattern, names in (overrides or {}).items():
        if fnmatchcase(name, pattern):
            found = _structures(names)
    return found


def _plan(
    layers: Mapping[str, Layer],
    menus: Mapping[str, Sequence[Candidate]],
    allocation: Allocation,
    left: Mapping[str, str],
    strategy: str,
    budget: Budget,
    limits: Mapping[str, float],
    tokens: int,
) -> Plan:
    planned = {
        name: PlannedLayer(
            in_features=layer.sizes.in_features,
            out_features=layer.sizes.out_features,
            structure=allocation.chosen[name].structure,
            predicted_loss=allocation.chosen[name].loss,
            costs=dict(allocation.chosen[name].costs),
            dense_costs=dict(menus[name][0].costs),
        )
        for name, layer in layers.items()
    }
    return Plan(
        layers=planned,
        left=dict(left),
        strategy=strategy,
        budget=budget.model_dump(exclude_none=True),
        limits=dict(limits),
        tokens=tokens,
        predicted_loss=sum(each.predicted_loss for each in planned.values()),
        bound=allocation.bound,
        gap=allocation.gap,
    )

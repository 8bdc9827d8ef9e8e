"""``restructure_``: from a budget to a plan, and to the model that it describes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from rich.progress import track
from torch import nn

from structfly.config.budget import Budget
from structfly.errors import ArgumentError
from structfly.lowering.device_profile import device_profile
from structfly.patterns.structure import Structure
from structfly.patterns.structures import OFFERED, STRUCTURES
from structfly.restructure.allocation import STRATEGIES, dense_totals
from structfly.restructure.apply import apply_
from structfly.restructure.calibrating import Calibration
from structfly.restructure.candidates import Candidate, candidates_of
from structfly.restructure.costs import Conditions
from structfly.restructure.layers import check_globs, find_layers
from structfly.restructure.plan import Measured, Plan, PlannedLayer
from structfly.restructure.refinement import refined
from structfly.rewriter.sensitivity import Losses


def restructure_(
    model: nn.Module,
    budget: Budget,
    *,
    calibration: Iterable[Any] | None = None,
    loss_fn: Losses | None = None,
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
        calibration: batches, whatever ``loss_fn`` takes; they are held, for the loss is measured on them before and
            after.
        loss_fn: (model, batch) -> the losses of the batch's independent terms (n,), or their mean (); where there are
            no labels, a :class:`~structfly.restructure.distillation.Distillation`.
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
    offered, has_data = _structures(structures), calibration is not None
    if strategy not in STRATEGIES:
        raise ArgumentError(f"strategy is {strategy!r}; allowed: {', '.join(STRATEGIES)}")
    if strategy != "solver" and budget.loss is not None:
        raise ArgumentError(f"the strategy {strategy!r} cannot seek the least time; leave budget.loss out")
    if sensitivity not in ("fisher", "inputs"):
        raise ArgumentError(f"sensitivity is {sensitivity!r}; allowed: fisher, inputs")
    if has_data != (loss_fn is not None):
        raise ArgumentError("calibration and loss_fn go together; give both, or neither")
    if not has_data and (refine or resume is not None or sensitivity != "fisher"):
        raise ArgumentError("refine, resume and sensitivity are of calibration data; give calibration and loss_fn")
    layers, left = find_layers(model, include, exclude)
    check_globs("overrides", overrides or {}, layers)
    known = Calibration.without_data(layers, left)
    if calibration is not None and loss_fn is not None:
        path = None if resume is None else Path(resume)
        known = Calibration.of(
            model,
            layers,
            left,
            calibration,
            loss_fn,
            sensitivity=sensitivity,
            seed=seed,
            progress=progress,
            resume=path,
        )
    if not known.layers:
        raise ArgumentError(f"no layer is left to restructure; left: {known.left or 'the model has no linear layers'}")
    device = next(iter(known.layers.values())).weight.device
    conditions = Conditions(tokens or known.tokens, device_profile(device))
    menus = {
        name: candidates_of(layer, _offered_to(name, offered, overrides or {}), conditions, known.statistics[name])
        for name, layer in track(known.layers.items(), "candidates", disable=not progress)
    }
    if refine and known.loss is not None:
        beside = None if resume is None else Path(f"{resume}.refinement.json")
        menus = refined(
            model, known.layers, menus, known.statistics, known.loss, refine, progress=progress, resume=beside
        )
    plan = _plan(known, menus, budget, strategy, conditions.tokens)
    before = None if known.loss is None else known.loss.of(model)
    apply_(model, plan, statistics=known.statistics, progress=progress)
    if known.loss is None or before is None:
        return plan
    return plan.model_copy(update={"measured": Measured(dense=before, structured=known.loss.of(model))})


def _structures(names: Sequence[str]) -> list[type[Structure]]:
    for name in names:
        if name not in STRUCTURES:
            raise ArgumentError(f"there is no structure {name!r}; there are {', '.join(STRUCTURES)}")
    return [each for name, each in STRUCTURES.items() if name in names]


def _offered_to(
    name: str, offered: Sequence[type[Structure]], overrides: Mapping[str, Sequence[str]]
) -> Sequence[type[Structure]]:
    for pattern, names in overrides.items():
        if fnmatchcase(name, pattern):
            offered = _structures(names)
    return offered


def _plan(
    known: Calibration, menus: Mapping[str, Sequence[Candidate]], budget: Budget, strategy: str, tokens: int
) -> Plan:
    totals = dense_totals(menus, list(budget.limits))
    limits = {resource: limit.of(totals[resource]) for resource, limit in budget.limits.items()}
    allocation = STRATEGIES[strategy](menus, budget, limits)
    planned = {
        name: PlannedLayer(
            in_features=layer.sizes.in_features,
            out_features=layer.sizes.out_features,
            structure=allocation.chosen[name].structure,
            predicted_loss=allocation.chosen[name].loss,
            costs=dict(allocation.chosen[name].costs),
            dense_costs=dict(menus[name][0].costs),
        )
        for name, layer in known.layers.items()
    }
    return Plan(
        layers=planned,
        left=dict(known.left),
        strategy=strategy,
        budget=budget.model_dump(exclude_none=True),
        limits=limits if budget.loss is None else {**limits, "loss": budget.loss},
        tokens=tokens,
        predicted_loss=sum(each.predicted_loss for each in planned.values()),
        bound=allocation.bound,
        gap=allocation.gap,
    )

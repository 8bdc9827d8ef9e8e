"""``survey``: what does not depend on a budget, found out once for all budgets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args

from rich.progress import track
from torch import Tensor, nn

from structfly.errors import ArgumentError
from structfly.layer_times.known import LayerTimes
from structfly.layer_times.rates import profile_on
from structfly.layer_times.store import keep_times, known_times, origin_on, read_user_times
from structfly.lowering.device_profile import device_profile
from structfly.patterns.linear.candidates import Candidate, losses_of, offered, timed, undominated
from structfly.patterns.structure import Structure
from structfly.patterns.structures import OFFERED, STRUCTURES
from structfly.records.layer import LayerStatistics, Passes, Shape
from structfly.restructure.calibrating import Calibration
from structfly.restructure.layers import check_globs, find_layers
from structfly.restructure.refinement import refined
from structfly.restructure.surveyed import Survey
from structfly.rewriter.layer_costs import Conditions
from structfly.rewriter.sensitivity import Losses


def survey(
    model: nn.Module,
    *,
    calibration: Iterable[Any] | None = None,
    loss_fn: Losses | None = None,
    refine: int = 0,
    structures: Sequence[str] = OFFERED,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] | None = None,
    overrides: Mapping[str, Sequence[str]] | None = None,
    sensitivity: Literal["fisher", "inputs"] = "fisher",
    tokens: int | None = None,
    seed: int = 0,
    passes: Passes = "forward",
    timing_seconds: float | None = None,
    progress: bool = True,
    resume: Path | str | None = None,
) -> Survey:
    """Find out what each linear layer of ``model`` may become, at what cost and loss.  The model is left as it is.

    What takes long and does not depend on a budget is done here: ``survey(...).plan(budget)`` takes a moment, and
    ``apply_(copy of the model, plan, statistics=survey.statistics)`` makes of the copy what
    :func:`~structfly.restructure.restructuring.restructure_` would, of which all arguments are.  The survey holds the
    calibration batches, to measure losses on them.

    Args:
        timing_seconds: give as many as you allow where plans are to be made for a budget of time, or for the least
            time; with 0 nothing is timed, and what was measured before counts; with None all times are predicted by the
            roofline alone.

    Raises:
        ArgumentError: an argument is wrong, or no layer is left to restructure.
        ConfigError: the file of layers' times has something wrong in it.
        UnsupportedError: layers are to be timed on a device on which they cannot be.
    """
    known_structures, has_data = _structures(structures), calibration is not None
    if sensitivity not in ("fisher", "inputs"):
        raise ArgumentError(f"sensitivity is {sensitivity!r}; allowed: fisher, inputs")
    if has_data != (loss_fn is not None):
        raise ArgumentError("calibration and loss_fn go together; give both, or neither")
    if not has_data and (refine or resume is not None or sensitivity != "fisher"):
        raise ArgumentError("refine, resume and sensitivity are of calibration data; give calibration and loss_fn")
    if passes not in get_args(Passes):
        raise ArgumentError(f"passes is {passes!r}; allowed: {', '.join(get_args(Passes))}")
    if timing_seconds is not None and not 0 <= timing_seconds < math.inf:
        raise ArgumentError(f"timing_seconds is {timing_seconds!r}; allowed: a number of at least 0, or None")
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
    offers = {name: _offered_to(name, known_structures, overrides or {}) for name in known.layers}
    shapes = {name: Shape(layer.sizes, layer.weight.dtype) for name, layer in known.layers.items()}
    tokens, profile, times = tokens or known.tokens, device_profile(device), None
    if timing_seconds is not None:
        origin, users = origin_on(device), read_user_times()
        profile = profile_on(device, origin, users)
        times = LayerTimes(device, profile, known_times(origin, users), passes=passes, seconds=timing_seconds)
        times.spread(_by_shape(shapes, offers), tokens, progress=progress)
        keep_times(times.entries())
    conditions = Conditions(tokens, profile, passes)
    menus: Mapping[str, Sequence[Candidate]] = {
        name: _menu(shapes[name], offers[name], layer.weight, known.statistics[name], conditions, times)
        for name, layer in track(known.layers.items(), "candidates", disable=not progress)
    }
    dense_loss = None if known.loss is None else known.loss.of(model)
    if refine and known.loss is not None and dense_loss is not None:
        beside = None if resume is None else Path(f"{resume}.refinement.json")
        menus = refined(
            model,
            known.layers,
            menus,
            known.statistics,
            known.loss,
            refine,
            dense_loss=dense_loss,
            progress=progress,
            resume=beside,
        )
    return Survey(
        shapes=shapes,
        menus=menus,
        statistics=known.statistics,
        left=known.left,
        tokens=tokens,
        loss=known.loss,
        dense_loss=dense_loss,
        times=() if times is None else times.at(tokens),
        untimed=0 if times is None else len(times.refused),
    )


def _menu(
    shape: Shape,
    structures: Sequence[type[Structure]],
    weight: Tensor,
    statistics: LayerStatistics,
    conditions: Conditions,
    times: LayerTimes | None,
) -> list[Candidate]:
    """The dense weight first, then what is worth choosing from; without times those that the roofline predicts."""
    candidates = offered(*shape, structures, losses_of(weight, statistics), conditions.amounts)
    if times is not None:
        known = times
        candidates = timed(candidates, lambda each: known.of(each.structure, shape, conditions.tokens))
    return undominated(candidates)


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


def _by_shape(
    shapes: Mapping[str, Shape], offers: Mapping[str, Sequence[type[Structure]]]
) -> dict[Shape, list[type[Structure]]]:
    """What is offered to the layers of each shape."""
    found: dict[Shape, list[type[Structure]]] = {}
    for name, shape in shapes.items():
        there = found.setdefault(shape, [])
        there += [each for each in offers[name] if each not in there]
    return found

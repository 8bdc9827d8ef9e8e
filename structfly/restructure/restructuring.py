"""``restructure_``: from a budget to a plan, and to the model that it describes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from structfly import measure
from structfly.config.budget import Budget
from structfly.patterns.structures import OFFERED
from structfly.records.layer import Passes
from structfly.restructure.allocation import check_strategy
from structfly.restructure.apply import apply_
from structfly.restructure.plan import Plan
from structfly.restructure.surveying import survey
from structfly.rewriter.sensitivity import Losses

_TIMING_SECONDS = 30.0


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
    passes: Passes = "forward",
    timing_seconds: float | None = None,
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
        passes: what the time is of: "forward", a pass without gradients, or "training", forward and backward.
        timing_seconds: how long layers may be timed on the model's device, eager: the dense one and up to five settings
            of each structure, for each shape.  What was measured before, here or by ``structfly calibrate``, is not
            measured again, and what is measured is kept.  Predicted times are corrected by measured ones.  None for 30
            where the budget limits time or loss, on CPUs and CUDA devices; else times decide nothing, and the
            roofline predicts them.
        progress: whether bars are shown.
        resume: a file that keeps the statistics of calibration, and beside it one with what ``refine`` measured; a run
            of the same model and data that was stopped goes on from them.

    Returns:
        the plan, which says what each layer became.

    Raises:
        ConfigError: the budget is none, or the file of layers' times has something wrong in it.
        PlanError: the budget cannot be kept; the message says what can.
        ArgumentError: an argument is wrong, or no layer is left to restructure.
        UnsupportedError: layers are to be timed on a device on which they cannot be.
    """
    check_strategy(strategy, budget)
    if timing_seconds is None and budget.counts_time:
        possible = all(parameter.device.type in measure.MEASURED_DEVICES for parameter in model.parameters())
        timing_seconds = _TIMING_SECONDS if possible else None
    found = survey(
        model,
        calibration=calibration,
        loss_fn=loss_fn,
        refine=refine,
        structures=structures,
        include=include,
        exclude=exclude,
        overrides=overrides,
        sensitivity=sensitivity,
        tokens=tokens,
        seed=seed,
        passes=passes,
        timing_seconds=timing_seconds,
        progress=progress,
        resume=resume,
    )
    plan = found.plan(budget, strategy)
    apply_(model, plan, statistics=found.statistics, progress=progress)
    return plan if found.loss is None else found.measured(plan, model)

"""Predicted losses corrected by measured ones: a few candidates of each layer, with that layer alone replaced."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.progress import Progress
from torch import nn

from structfly.patterns.linear.candidates import Candidate
from structfly.patterns.structure import StructuredLinear
from structfly.records.layer import LayerStatistics
from structfly.restructure.layers import Layer
from structfly.restructure.measuring import Loss
from structfly.restructure.replacing import replaced

_LEAST = 1e-30


def refined(
    model: nn.Module,
    layers: Mapping[str, Layer],
    menus: Mapping[str, Sequence[Candidate]],
    statistics: Mapping[str, LayerStatistics],
    loss: Loss,
    count: int,
    *,
    dense_loss: float,
    progress: bool = True,
    resume: Path | None = None,
) -> dict[str, list[Candidate]]:
    """The menus with what is predicted multiplied by measured over predicted.

    That ratio is measured at ``count`` candidates of each layer, evenly spaced by the predicted loss's rank, and
    between them interpolated along its logarithm.

    Args:
        dense_loss: of ``model`` as it is.
        resume: a file that keeps what was measured; a run that was stopped goes on from it.
    """
    measured: dict[str, dict[str, float]] = {}
    if resume is not None and resume.exists():
        measured = json.loads(resume.read_text(encoding="utf-8"))
    found: dict[str, list[Candidate]] = {}
    with Progress(disable=not progress) as bar:
        task = bar.add_task("refinement", total=len(layers))
        for name, layer in layers.items():
            known, rises = measured.setdefault(name, {}), []
            for each in _spread([each for each in menus[name] if each.structure is not None], count):
                assert each.structure is not None
                key = f"{each.structure!r} {each.loss!r}"  # what was predicted otherwise is measured anew
                if key not in known:
                    made = StructuredLinear.from_linear(layer.as_linear(), each.structure, statistics[name])
                    with replaced(model, name, layer.in_place_of(made)):
                        known[key] = loss.of(model) - dense_loss
                rises.append((each.loss, known[key]))
            if resume is not None:
                _write(resume, measured)
            found[name] = _corrected(menus[name], rises)
            bar.advance(task)
    return found


def _write(path: Path, measured: Mapping[str, Mapping[str, float]]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _spread(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """``count`` of them, evenly spaced in order of their loss."""
    ordered = sorted(candidates, key=lambda each: each.loss)
    picks = np.linspace(0, len(ordered) - 1, min(count, len(ordered))).round() if ordered else ()
    return [ordered[pick] for pick in dict.fromkeys(map(int, picks))]


def _corrected(candidates: Sequence[Candidate], rises: Sequence[tuple[float, float]]) -> list[Candidate]:
    known = sorted((max(predicted, _LEAST), max(measured, _LEAST)) for predicted, measured in rises)
    if not known:
        return list(candidates)
    at = np.log([predicted for predicted, _ in known])
    ratios = np.log([measured / predicted for predicted, measured in known])
    return [
        each
        if each.structure is None
        else replace(each, loss=float(each.loss * np.exp(np.interp(np.log(max(each.loss, _LEAST)), at, ratios))))
        for each in candidates
    ]

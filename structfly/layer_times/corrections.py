"""Predicted times corrected by measured ones, at one number of tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import torch

from structfly.patterns.structure import Structure
from structfly.records.layer import LayerSeconds, LayerSizes, Shape, TimeSource

_Key: TypeAlias = tuple[str, Shape | None]


@dataclass(frozen=True)
class LayerTime:
    """What is known of one layer.

    Attributes:
        structure: of the layer, None for the dense one.
        sizes: of the layer.
        dtype: of its weights and inputs.
        tokens: rows of its input.
        device: its name.
        predicted: seconds by the roofline.
        seconds: measured; of structures relative to the dense layer, so that what else the device did meanwhile, or
            how hot it was, is no part of it.
        source: whether it was measured at just as many tokens.
    """

    structure: Structure | None
    sizes: LayerSizes
    dtype: torch.dtype
    tokens: int
    device: str
    predicted: float
    seconds: float
    source: TimeSource = "measured"


class _Curve(NamedTuple):
    """Of some measured layers, by predicted time: logarithms of that, and of measured over predicted."""

    predicted: np.ndarray
    ratios: np.ndarray

    def at(self, predicted: float) -> float:
        """The ratio there, interpolated linearly between the logarithms and beyond them that of the nearest."""
        return float(np.exp(np.interp(np.log(predicted), self.predicted, self.ratios)))


class Corrections:
    """What measured times say of others.

    A setting that was measured has its measured time.  Another's is the roofline's times measured over predicted, of
    the settings of its structure at its shape, else of those at other shapes, else of the dense layer at its shape.
    """

    def __init__(self, times: Iterable[LayerTime]) -> None:
        times = list(times)
        self._known = {
            (each.structure, Shape(each.sizes, each.dtype)): LayerSeconds(each.seconds, each.source) for each in times
        }
        pooled = defaultdict[_Key, list[LayerTime]](list)
        for each in times:
            for key in _keys(each.structure, Shape(each.sizes, each.dtype)):
                pooled[key].append(each)
        self._curves = {key: _curve(each) for key, each in pooled.items()}

    def of(self, shape: Shape, structure: Structure | None, predicted: float) -> LayerSeconds:
        """The time of a layer that the roofline predicts to take ``predicted`` seconds."""
        if (structure, shape) in self._known:
            return self._known[structure, shape]
        keys = (*_keys(structure, shape), _key(None, shape))
        curve = next((self._curves[key] for key in keys if key in self._curves), None)
        if curve is None:
            return LayerSeconds(predicted, "roofline")
        return LayerSeconds(predicted * curve.at(predicted), "corrected")


def _key(structure: Structure | None, shape: Shape | None) -> _Key:
    return "dense" if structure is None else structure.name, shape


def _keys(structure: Structure | None, shape: Shape) -> Iterator[_Key]:
    """Of the pools that a measurement goes into, the nearest first."""
    yield _key(structure, shape)
    yield _key(structure, None)


def _curve(times: Iterable[LayerTime]) -> _Curve:
    """Several of one predicted time count as their geometric mean."""
    ratios = defaultdict[float, list[float]](list)
    for each in times:
        ratios[each.predicted].append(np.log(each.seconds / each.predicted))
    at = sorted(ratios)
    return _Curve(np.log(at), np.array([np.mean(ratios[each]) for each in at]))

"""Predicted times corrected by measured ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from structfly.patterns.structure import Structure
from structfly.restructure.timing import LayerTime, Shape

TimeSource: TypeAlias = Literal["roofline", "corrected", "measured"]
"""Where a time comes from: the roofline alone, the roofline and measurements of others, or its own measurement."""

_Key: TypeAlias = tuple[str, Shape | None]


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
        self._measured = {(each.structure, Shape(each.sizes, each.dtype)): each.seconds for each in times}
        pooled = defaultdict[_Key, list[LayerTime]](list)
        for each in times:
            for key in _keys(each.structure, Shape(each.sizes, each.dtype)):
                pooled[key].append(each)
        self._curves = {key: _curve(each) for key, each in pooled.items()}

    def of(self, shape: Shape, structure: Structure | None, predicted: float) -> float:
        """Seconds of a layer that the roofline predicts to take ``predicted``."""
        if (structure, shape) in self._measured:
            return self._measured[structure, shape]
        curve = self._curve_for(structure, shape)
        return predicted if curve is None else predicted * curve.at(predicted)

    def source(self, shape: Shape, structure: Structure | None) -> TimeSource:
        """Where that number comes from."""
        if (structure, shape) in self._measured:
            return "measured"
        return "roofline" if self._curve_for(structure, shape) is None else "corrected"

    def _curve_for(self, structure: Structure | None, shape: Shape) -> _Curve | None:
        keys = (*_keys(structure, shape), _key(None, shape))
        return next((self._curves[key] for key in keys if key in self._curves), None)


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

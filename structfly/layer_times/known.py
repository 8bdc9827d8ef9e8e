"""Times of layers on one device: those that are known, and within a bound those that are measured on first need."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import torch
from rich.progress import Progress
from torch import nn

from structfly.layer_times.corrections import Corrections, LayerTime
from structfly.layer_times.interpolation import Found, at_tokens
from structfly.layer_times.store import Key, TimedLayer, origin_on, precision_of
from structfly.layer_times.timing import Timer, layer_seconds
from structfly.patterns.structure import Structure
from structfly.records import DeviceProfile
from structfly.records.layer import DTYPES, OWN_MEASUREMENTS, AppliedOp, LayerSeconds, Passes, Shape
from structfly.rewriter.layer_costs import Conditions, dense_cost

SPREAD = ((0.5,), (0.0, 1.0), (0.25, 0.75))
"""Of the settings of a structure that are timed, by round: where they stand in order of predicted time."""

_Key: TypeAlias = Structure | AppliedOp


@dataclass
class _Entry:
    """Of a dense layer at some number of tokens.

    Attributes:
        dense: its seconds.
        relative: times of structures to the dense layer's in the same rounds.
        own: whether it was measured with what is installed, rather than shipped.
        added: what of ``relative`` was measured now, None where nothing was.
    """

    dense: float
    relative: dict[_Key, float]
    own: bool
    added: dict[_Key, float] | None = None


class LayerTimes:
    """What is known of layers' times on one device.

    Args:
        device: where they are timed.
        profile: what the roofline assumes of it.
        known: entries of this device, what counts more later.
        passes: what the times are of.
        seconds: of measuring; no measurement begins when so many have been spent.

    Raises:
        UnsupportedError: for a device on which nothing can be measured.
    """

    def __init__(
        self,
        device: torch.device,
        profile: DeviceProfile,
        known: Iterable[TimedLayer],
        *,
        passes: Passes = "forward",
        seconds: float = 0.0,
        timer: Timer = layer_seconds,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.device, self.profile, self.passes, self.seconds = device, profile, passes, seconds
        self.origin = origin_on(device)
        self.refused: set[tuple[_Key | None, Shape, int]] = set()
        """Layers that were to be timed and were not, for the time that is allowed was up, or memory was short."""
        self.spent = 0.0
        """Seconds of measuring so far."""
        self._timer, self._clock = timer, clock
        self._entries: dict[tuple[Shape, int], _Entry] = {}
        dtypes = {precision_of(dtype, device.type): dtype for dtype in DTYPES}
        for each in known:
            if each.passes == passes and each.precision in dtypes:
                place = Shape(each.key.sizes, dtypes[each.precision]), each.tokens
                before = self._entries[place].relative if place in self._entries else {}
                self._entries[place] = _Entry(each.dense, {**before, **each.relative}, each.origin == self.origin)
        self._short: set[tuple[_Key | None, Shape, int]] = set()  # of memory
        self._corrections: dict[int, Corrections] = {}
        self.predicted = cache(self._predicted)

    def of(self, structure: Structure | None, shape: Shape, tokens: int) -> LayerSeconds:
        """The time of a layer, None for the dense one, over so many tokens."""
        if tokens not in self._corrections:
            self._corrections[tokens] = Corrections(self.at(tokens))
        return self._corrections[tokens].of(shape, structure, self.predicted(structure, shape, tokens))

    def at(self, tokens: int) -> tuple[LayerTime, ...]:
        """What is known of layers over so many tokens, by their own measurements."""
        series: dict[Shape, dict[int, _Entry]] = defaultdict(dict)
        for (shape, count), entry in self._entries.items():
            series[shape][count] = entry
        return tuple(
            LayerTime(
                structure,
                *shape,
                tokens,
                self.origin.device,
                self.predicted(structure, shape, tokens),
                found.value,
                found.source,
            )
            for shape, entries in series.items()
            for structure, found in _known(entries, tokens)
            if not isinstance(structure, AppliedOp)
        )

    def of_op(self, op: AppliedOp, shape: Shape, tokens: int) -> LayerSeconds | None:
        """The time of a layer as its op has it; None where it was not measured."""
        entries = {count: entry for (each, count), entry in self._entries.items() if each == shape}
        found = dict(_known(entries, tokens)).get(op)
        return None if found is None else LayerSeconds(found.value, found.source)

    def measure(self, structure: Structure | None, shape: Shape, tokens: int) -> bool:
        """Time a layer; False where its time is known already, or may not be measured."""
        if self.of(structure, shape, tokens).source in OWN_MEASUREMENTS:
            return False
        return self._measure(structure, lambda: structure, shape, tokens)

    def measure_op(self, op: AppliedOp, layer: Callable[[], nn.Module], shape: Shape, tokens: int) -> bool:
        """Time a layer as its op has it, which ``layer`` makes; False where its time is known already, or may not be
        measured."""
        return self.of_op(op, shape, tokens) is None and self._measure(op, layer, shape, tokens)

    def _measure(
        self, key: _Key | None, what: Callable[[], Structure | nn.Module | None], shape: Shape, tokens: int
    ) -> bool:
        wanted = (key, shape, tokens)
        if precision_of(*self._precise(shape)) is None:
            return False
        if self.spent >= self.seconds or wanted in self._short:
            self.refused.add(wanted)
            return False
        start = self._clock()
        try:
            taken = self._timer(what(), shape, tokens, self.device, self.passes)
        except torch.OutOfMemoryError:
            self._short.add(wanted)
            self.refused.add(wanted)
            return False
        finally:
            self.spent += self._clock() - start
        entry = self._entries.setdefault((shape, tokens), _Entry(taken.dense, {}, True))
        if not entry.own:
            entry.dense, entry.own = taken.dense, True
        entry.added = entry.added or {}
        if key is not None:
            entry.relative[key] = entry.added[key] = taken.layer / taken.dense
        self._corrections.pop(tokens, None)
        return True

    def spread(
        self,
        offered: Mapping[Shape, Sequence[type[Structure]]],
        tokens: int,
        *,
        rounds: int = len(SPREAD),
        progress: bool = False,
    ) -> None:
        """Time layers of each shape: the dense one first, then of each structure the setting in the middle of its menu
        by predicted time, the least and the largest, and the two between.

        Args:
            offered: shapes, each with the structures offered there.
            rounds: how many of those three are made.
        """
        wanted = list(self._in_order(offered, tokens, rounds))
        with Progress(disable=not progress) as bar:
            for structure, shape in bar.track(wanted, description="times"):
                self.measure(structure, shape, tokens)

    def entries(self) -> Iterator[TimedLayer]:
        """What was measured since the object was made, for :func:`~structfly.layer_times.store.add_times`."""
        for (shape, tokens), entry in self._entries.items():
            precision = precision_of(*self._precise(shape))
            if entry.added is not None and precision is not None:
                yield TimedLayer.of(
                    self.origin, Key(shape.sizes, precision, self.passes, tokens), entry.dense, entry.added
                )

    def _precise(self, shape: Shape) -> tuple[torch.dtype, str]:
        return shape.dtype, self.device.type

    def _predicted(self, structure: Structure | None, shape: Shape, tokens: int) -> float:
        cost = dense_cost(*shape) if structure is None else structure.cost(*shape)
        return Conditions(tokens, self.profile, self.passes).amounts(cost)["time"]

    def _in_order(
        self, offered: Mapping[Shape, Sequence[type[Structure]]], tokens: int, rounds: int
    ) -> Iterator[tuple[Structure | None, Shape]]:
        """What is timed: of what is most wanted first, for all shapes."""
        yield from ((None, shape) for shape in offered)
        menus = []
        for shape, structures in offered.items():
            for structure in structures:
                menu = [each for each in structure.menu(shape.sizes) if not each.why_not(shape.sizes)]
                ranked = sorted(menu, key=lambda each: self.predicted(each, shape, tokens))
                menus.append((shape, ranked, set[int]()))
        for ranks in SPREAD[:rounds]:
            for shape, ranked, taken in menus:
                for rank in ranks:
                    pick = round(rank * (len(ranked) - 1))
                    if ranked and pick not in taken:
                        taken.add(pick)
                        yield ranked[pick], shape


def _known(entries: Mapping[int, _Entry], tokens: int) -> Iterator[tuple[_Key | None, Found]]:
    """Seconds of each layer of a shape that has been measured at so many tokens, or on both sides."""
    dense = at_tokens({count: entry.dense for count, entry in entries.items()}, tokens)
    if dense is None:
        return
    yield None, dense
    for structure in dict.fromkeys(each for entry in entries.values() for each in entry.relative):
        known = {count: entry.relative[structure] for count, entry in entries.items() if structure in entry.relative}
        found = at_tokens(known, tokens)
        if found is not None:
            yield structure, Found(dense.value * found.value, found.source)

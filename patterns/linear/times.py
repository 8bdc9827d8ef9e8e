"""The candidates of a layer of a graph with times that are measured, where time counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from structfly.patterns.linear.candidates import Candidate, timed, undominated
from structfly.patterns.linear.site import LinearSite
from structfly.patterns.structure import Structure
from structfly.records import LayerCandidate, LayerMenu
from structfly.records.layer import TIMES_FROM, LayerSeconds, Shape


class Times(Protocol):
    """Times of layers on one device, known and measured."""

    @property
    def refused(self) -> Collection[Any]:
        """Layers that were to be timed and were not, for no more time may be spent on it."""
        ...

    def of(self, structure: Structure | None, shape: Shape, tokens: int) -> LayerSeconds:
        """The time of a layer, None for the dense one, over so many tokens."""
        ...

    def measure(self, structure: Structure | None, shape: Shape, tokens: int) -> bool:
        """Time a layer; False where its time is known already, or may not be measured."""
        ...

    def spread(self, offered: Mapping[Shape, Sequence[type[Structure]]], tokens: int, *, rounds: int) -> None:
        """Time layers of each shape: the dense one, and of what each structure offers some more in every round."""
        ...


@dataclass(frozen=True)
class TimedCandidates:
    """What a site may become: a :class:`~structfly.records.LayerTiming`.

    Attributes:
        rows: that each call has.
        candidates: all of them, the dense weight among them.
        times: of layers on the site's device.
        losses: what these are predicted from.
    """

    shape: Shape
    rows: Sequence[int]
    candidates: Sequence[Candidate]
    times: Times
    losses: str

    @classmethod
    def of(
        cls,
        site: LinearSite,
        structures: Sequence[type[Structure]],
        candidates: Sequence[Candidate],
        times: Times,
        losses: str,
    ) -> TimedCandidates:
        """With a first measurement of the dense layer and of each structure, where they are not known."""
        shape = Shape(site.layer, site.dtypes[0])
        for rows in dict.fromkeys(site.rows):
            times.spread({shape: structures}, rows, rounds=1)
        return cls(shape, site.rows, candidates, times, losses)

    def measure(self, candidate: LayerCandidate) -> bool:
        """Time it at the number of rows of every call; False where nothing is to be measured any more."""
        assert isinstance(candidate, Candidate)
        new = [self.times.measure(candidate.structure, self.shape, rows) for rows in dict.fromkeys(self.rows)]
        return any(new)

    def menu(self) -> LayerMenu:
        """The menu, with the times that are known by now."""
        candidates = timed(self.candidates, self._time_of)
        counts = Counter(each.time_from for each in candidates)
        listed = ", ".join(f"{counts[source]} {words}" for source, words in TIMES_FROM.items() if counts[source])
        basis = f"{self.losses}; times of the {len(candidates)} candidates: {listed}"
        if self.times.refused:
            basis += ", for no more time could be spent on it within timing_seconds"
        return LayerMenu(tuple(undominated(candidates)), basis=basis, timing=self)

    def _time_of(self, candidate: Candidate) -> LayerSeconds:
        """Of all calls together; as well founded as the least of them."""
        calls = [self.times.of(candidate.structure, self.shape, rows) for rows in self.rows]
        best_first = list(TIMES_FROM)
        source = max((each.source for each in calls), key=best_first.index)
        return LayerSeconds(sum(each.seconds for each in calls), source)

"""What is made of weights that the model still owns: their factors, and what structures are predicted to cost them.

Factors are projected when they are first asked for, and again when a weight has changed.  A graph may be run with other
modules than it was compiled with, so that the weight is that of each call.  Factors are held by the graphs that use
them and found by the weight, so that graphs which make the same of a weight share them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from structfly import compat
from structfly.patterns.linear.candidates import Losses, losses_of
from structfly.patterns.structure import Structure, widened
from structfly.records.layer import LayerSizes

_refreshes = count(1)
_generation = 0


def refresh() -> None:
    """Forget what compiled graphs have projected of weights; each is projected again when it is next used.

    Graphs notice by themselves when a weight is written in place or replaced, as optimizers and ``load_state_dict`` do.
    They do not notice writes through ``weight.data``: call this after them.
    """
    global _generation
    _generation = next(_refreshes)


def state_of(weight: Tensor) -> tuple[int, ...]:
    """Another one when the weight has changed: every write in place counts up its version, but for those through
    ``.data``; assigning ``.data`` changes its address."""
    return compat.version(weight), weight.data_ptr(), _generation


@contextmanager
def plainly(weight: Tensor) -> Iterator[None]:
    """Outside of the modes that a call stands in."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        yield


class Wanted(NamedTuple):
    """What is made of a weight.

    Attributes:
        structure: what it is made of.
        dtype: of the factors that are learned.
        transposed: whether the weight is stored as (in, out).
    """

    structure: Structure
    dtype: torch.dtype
    transposed: bool

    def of(self, weight: Tensor) -> Tensor:
        """The weight as (out, in), detached."""
        return weight.detach().t() if self.transposed else weight.detach()


class _Projection:
    """The factors of one weight, at the same addresses as long as they live."""

    def __init__(self, weight: Tensor, wanted: Wanted) -> None:
        self.wanted = wanted
        out_features, in_features = wanted.of(weight).shape
        with plainly(weight):
            self.factors = [
                torch.empty(shape, dtype=wanted.dtype if learned else torch.int32, device=weight.device)
                for shape, learned in wanted.structure.factors(LayerSizes(in_features, out_features)).values()
            ]
        self.made_of: tuple[int, ...] | None = None

    def update(self, weight: Tensor) -> None:
        """Project the weight, if it is not what it was."""
        state = state_of(weight)
        if state == self.made_of:
            return
        with plainly(weight):
            made = self.wanted.structure.project(widened(self.wanted.of(weight)))
            for own, factor in zip(self.factors, made.values(), strict=True):
                own.copy_(factor)
        self.made_of = state


_projections: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # weight -> what is wanted of it -> projection


class Projections:
    """The factors of every weight that one place of a graph is run with."""

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self._held: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def of(self, weight: Tensor) -> Sequence[Tensor]:
        """The factors, in the structure's order."""
        held: _Projection | None = self._held.get(weight)
        if held is None:
            held = self._held[weight] = self._find(weight)
        held.update(weight)
        return held.factors

    def _find(self, weight: Tensor) -> _Projection:
        of_weight = _projections.setdefault(weight, WeakValueDictionary())
        found: _Projection | None = of_weight.get(self.wanted)
        if found is None:
            found = of_weight[self.wanted] = _Projection(weight, self.wanted)
        return found


_LossesOfWeight = dict[tuple[bool, type[Structure]], tuple[tuple[int, ...] | None, tuple[float, ...]]]
_losses: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # of each weight, with the state that it was in


def remembered_losses(weight: Tensor, transposed: bool) -> Losses:
    """:func:`~structfly.patterns.linear.candidates.losses_of` a parameter, kept for when it is compiled for again: for
    another batch size, say."""
    of_weight: _LossesOfWeight = _losses.setdefault(weight, {})

    def losses(structure: type[Structure], menu: Sequence[Structure]) -> Sequence[float]:
        state, known = of_weight.get((transposed, structure), (None, ()))
        if state != state_of(weight):
            with plainly(weight):
                known = tuple(losses_of(weight.t() if transposed else weight)(structure, menu))
            of_weight[transposed, structure] = state_of(weight), known
        return known

    return losses

"""The dense weights of structured layers, whose factors the model still owns.

They are made when they are first asked for, and again when a factor has changed.  Graphs hold them, and those that make
the same of the same factors share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from structfly.lowering.layer_op import LayerOp
from structfly.patterns.linear.projection import plainly, state_of
from structfly.patterns.merged_linear.site import merged
from structfly.records.layer import LayerSizes


class Wanted(NamedTuple):
    """What is made of factors: the weight of ``op`` with these numbers, in a dtype."""

    op: LayerOp
    static: tuple[int, ...]
    sizes: LayerSizes
    dtype: torch.dtype


class _Merged:
    """The weight (out, in) of a layer's factors, at the same address as long as it lives."""

    def __init__(self, first: Tensor, wanted: Wanted) -> None:
        self.wanted = wanted
        with plainly(first):
            self.weight = torch.empty(wanted.sizes[::-1], dtype=wanted.dtype, device=first.device)
        self.made_of: list[tuple[int, ...]] = []

    def update(self, factors: Sequence[Tensor]) -> None:
        """Make it, if the factors are not what they were."""
        state = [state_of(each) for each in factors]
        if state == self.made_of:
            return
        op, static, sizes, _ = self.wanted
        with plainly(factors[0]):
            self.weight.copy_(merged(op, factors, static, sizes))
        self.made_of = state


_merged: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # first factor -> what is wanted -> weight


@dataclass
class MergedWeights:
    """The weights of all layers that one place of a graph is run with."""

    wanted: Wanted
    _held: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)

    def of(self, factors: Sequence[Tensor]) -> Tensor:
        """The weight (out, in)."""
        first = factors[0]
        held: _Merged | None = self._held.get(first)
        if held is None:
            of_first = _merged.setdefault(first, WeakValueDictionary())
            held = of_first.get(self.wanted)
            if held is None:
                held = of_first[self.wanted] = _Merged(first, self.wanted)
            self._held[first] = held
        held.update(factors)
        return held.weight

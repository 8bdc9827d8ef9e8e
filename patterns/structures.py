"""All structures by name: what plans may name, and what is offered by default."""

from __future__ import annotations

from collections.abc import Mapping

from structfly.patterns.block_butterfly import BlockButterfly
from structfly.patterns.kronecker import KroneckerSparse
from structfly.patterns.low_rank import LowRank
from structfly.patterns.monarch import Monarch
from structfly.patterns.pivoted_low_rank import PivotedLowRank
from structfly.patterns.structure import Structure

_ALL: tuple[type[Structure], ...] = (LowRank, PivotedLowRank, Monarch, KroneckerSparse, BlockButterfly)
STRUCTURES: Mapping[str, type[Structure]] = {each.name: each for each in _ALL}

OFFERED = ("low_rank", "pivoted_low_rank")
"""What ``restructure_`` offers by default: of what is near a trained weight under its statistics, these lose least for
their parameters; the others are for training from scratch, or where their speed counts."""

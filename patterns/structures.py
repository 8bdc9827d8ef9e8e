"""All structures by name: what plans may name, and what is offered by default."""

from __future__ import annotations

from collections.abc import Mapping

from structfly.patterns.low_rank import LowRank
from structfly.patterns.pivoted_low_rank import PivotedLowRank
from structfly.patterns.structure import Structure

STRUCTURES: Mapping[str, type[Structure]] = {each.name: each for each in (LowRank, PivotedLowRank)}

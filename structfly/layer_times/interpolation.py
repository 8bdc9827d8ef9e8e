"""Times at one number of tokens from those at others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from structfly.records.layer import TimeSource

# By a roofline a layer's time is max(a, b tokens).  Interpolated along logarithms between t and r t tokens that lie
# around its bend, it is too long by at most r^(1/4): by less than 19% within an octave.
_OCTAVE = 2


class Found(NamedTuple):
    """A value at some number of tokens, and whether it was measured there."""

    value: float
    source: TimeSource


def at_tokens(known: Mapping[int, float], tokens: int) -> Found | None:
    """What is known there: measured, or interpolated along logarithms between the nearest numbers of tokens on both
    sides, where those are no more than an octave apart; else None."""
    if tokens in known:
        return Found(known[tokens], "measured")
    below = max((each for each in known if each < tokens), default=None)
    above = min((each for each in known if each > tokens), default=None)
    if below is None or above is None or above > _OCTAVE * below:
        return None
    share = math.log(tokens / below) / math.log(above / below)
    return Found(math.exp((1 - share) * math.log(known[below]) + share * math.log(known[above])), "interpolated")

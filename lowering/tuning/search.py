"""The search for a product's fastest tiles: measured, within a given time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from structfly.errors import UnsupportedError
from structfly.lowering.gemm import TORCH_MM, Cut, Parts, Tiles, Warps
from structfly.lowering.tuning.limits import why_not
from structfly.lowering.tuning.products import ProductClass

# What is tried, a property after another, each with the best that was found for those before: the tile and its warps,
# the step and how many are in flight, the rows of tiles in a group, and the parts.
_SHAPES: tuple[tuple[int, int, Warps], ...] = (
    (128, 256, 8),
    (256, 128, 8),
    (128, 128, 4),
    (128, 128, 8),
    (64, 256, 4),
    (64, 128, 4),
)
_STEPS = ((64, 2), (64, 3), (64, 4), (32, 4), (32, 6), (128, 2))
_GROUPS = (4, 8, 16, 32)
_PARTS: tuple[Parts, ...] = (1, 2, 4)
# Times differ by as much from one run to the next; what is there stays unless another is faster by more.
_MARGIN = 0.01


@dataclass(frozen=True)
class Trial:
    """One measurement.

    Attributes:
        cut: what was tried.
        seconds: the time of a launch, None where there is none.
        problem: why there is none, or "".
    """

    cut: Cut
    seconds: float | None
    problem: str = ""


@dataclass(frozen=True)
class Search:
    """What was tried for a product, and what came of it.

    Attributes:
        trials: in order; the first is what is shipped.
        complete: whether all was tried in the time that was given.
    """

    product: ProductClass
    trials: tuple[Trial, ...]
    complete: bool

    @property
    def chosen(self) -> Cut | None:
        """The fastest; the first that could be measured unless another is faster by more than the noise.  None where
        nothing could be measured."""
        best: Trial | None = None
        for trial in self.trials:
            if _faster(trial, best):
                best = trial
        return None if best is None else best.cut


def search(
    product: ProductClass,
    start: Sequence[Cut],
    seconds_of: Callable[[Cut], float],
    *,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> Search:
    """Time ``start`` and what differs from the best so far in one property after another.

    Args:
        start: what is shipped, then what else is to be tried first; there are tiles among it.
        seconds_of: the time of a launch with these tiles.
        seconds: no trial begins later than this, but for the first.

    An :class:`~structfly.errors.UnsupportedError` of ``seconds_of`` is noted as the trial's problem.
    """
    assert product.device.capability is not None
    trials: dict[Cut, Trial] = {}
    began, complete = clock(), True
    best: Trial | None = None  # of those with tiles
    fastest = next(cut for cut in start if cut != TORCH_MM)
    for variants in (lambda _: iter(start), _shapes, _steps, _groups, _parts):
        for cut in variants(fastest):
            if cut in trials or why_not(product.template, cut, product.device.capability):
                continue
            if trials and clock() - began > seconds:
                complete = False
                break
            trials[cut] = trial = _tried(cut, seconds_of)
            if cut != TORCH_MM and _faster(trial, best):
                best, fastest = trial, cut
    return Search(product, tuple(trials.values()), complete)


def _tried(cut: Cut, seconds_of: Callable[[Cut], float]) -> Trial:
    try:
        return Trial(cut, seconds_of(cut))
    except UnsupportedError as error:
        return Trial(cut, None, str(error))


def _faster(trial: Trial, best: Trial | None) -> bool:
    if trial.seconds is None:
        return False
    return best is None or best.seconds is None or trial.seconds < best.seconds * (1 - _MARGIN)


def _shapes(tiles: Tiles) -> Iterator[Tiles]:
    return (replace(tiles, m=m, n=n, warps=warps) for m, n, warps in _SHAPES)


def _steps(tiles: Tiles) -> Iterator[Tiles]:
    return (replace(tiles, k=k, stages=stages) for k, stages in _STEPS)


def _groups(tiles: Tiles) -> Iterator[Tiles]:
    return (replace(tiles, group=group) for group in _GROUPS)


def _parts(tiles: Tiles) -> Iterator[Tiles]:
    return (replace(tiles, parts=parts) for parts in _PARTS)

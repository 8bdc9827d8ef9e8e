"""What measured times say of others at the same number of tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structfly.layer_times.corrections import Corrections, LayerTime
from structfly.patterns.block_sparse import BlockSparse
from structfly.patterns.low_rank import LowRank
from structfly.patterns.monarch import Monarch
from structfly.patterns.structure import Structure
from structfly.records.layer import Shape
from tests.layer_times.fabricated import CONDITIONS, LARGE, SMALL, predicted


def measured(structure: Structure | None, shape: Shape, ratio: float) -> LayerTime:
    expected = predicted(structure, shape)
    return LayerTime(structure, *shape, CONDITIONS.tokens, "a device", expected, expected * ratio)


ratios = st.floats(0.01, 100.0)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_corrections_follow_the_nearest_that_was_measured(data: st.DataObject) -> None:
    menu = LowRank.menu(SMALL.sizes)
    some = data.draw(st.lists(st.sampled_from(menu), min_size=1, max_size=5, unique=True))
    known = {each: data.draw(ratios) for each in some}
    dense, elsewhere = data.draw(ratios), data.draw(ratios)
    other = Monarch.menu(LARGE.sizes)[0]
    corrections = Corrections(
        [
            measured(None, SMALL, dense),
            measured(other, LARGE, elsewhere),
            *(measured(each, SMALL, ratio) for each, ratio in known.items()),
        ]
    )

    def ratio_of(structure: Structure | None, shape: Shape) -> tuple[float, str]:
        expected = predicted(structure, shape)
        found = corrections.of(shape, structure, expected)
        return found.seconds / expected, found.source

    by_time = {predicted(each, SMALL): each for each in menu}
    assert len(by_time) == len(menu)
    order = [by_time[time] for time in sorted(by_time)]
    for place, each in enumerate(order):
        ratio, source = ratio_of(each, SMALL)
        if each in known:
            assert ratio == pytest.approx(known[each])
            assert source == "measured"
            continue
        before = [known[found] for found in order[:place] if found in known][-1:]
        after = [known[found] for found in order[place:] if found in known][:1]
        assert source == "corrected"
        assert min(before + after) * (1 - 1e-9) <= ratio <= max(before + after) * (1 + 1e-9)
    # A structure without measurements at a shape: its own elsewhere, else the dense layer's, else none.
    for kind, shape, expected in ((Monarch, SMALL, elsewhere), (BlockSparse, SMALL, dense), (BlockSparse, LARGE, 1.0)):
        ratio, source = ratio_of(kind.menu(shape.sizes)[0], shape)
        assert ratio == pytest.approx(expected)
        assert source == ("roofline" if (kind, shape) == (BlockSparse, LARGE) else "corrected")


@settings(max_examples=10, deadline=None)
@given(ratio=ratios)
def test_interpolation_is_of_logarithms(ratio: float) -> None:
    """A power law between two measurements is met."""
    first, *middle, last = sorted(LowRank.menu(LARGE.sizes), key=lambda each: predicted(each, LARGE))
    ends = [predicted(each, LARGE) for each in (first, last)]
    corrections = Corrections([measured(first, LARGE, 1.0), measured(last, LARGE, ratio)])
    steepness = torch.tensor(ratio).double().log() / torch.tensor(ends[1] / ends[0]).double().log()
    for each in middle[:: len(middle) // 5]:
        expected = predicted(each, LARGE)
        assert corrections.of(LARGE, each, expected).seconds == pytest.approx(
            expected * float((expected / ends[0]) ** steepness)
        )

"""The rows that count, found by one kernel, against a loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structfly.lowering.linear_cross_entropy import live_rows
from structfly.lowering.linear_cross_entropy.live_rows import LiveRows
from tests.lowering.linear_cross_entropy.cases import make_call

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@settings(max_examples=20)
@given(
    targets=st.lists(st.integers(-2, 6), min_size=1, max_size=40),
    ignore_index=st.sampled_from((-1, 2, None)),
    zeros=st.sets(st.integers(0, 39)),
    length=st.integers(1, 50),
)
def test_as_a_loop_finds_them(targets: list[int], ignore_index: int | None, zeros: set[int], length: int) -> None:
    head = make_call(classes=5, device=DEVICE).head
    target = torch.tensor(targets, device=DEVICE)
    head = type(head)(**{**vars(head), "target": target, "ignore_index": ignore_index})
    coefficient = torch.ones(len(targets), device=DEVICE)
    coefficient[[row for row in zeros if row < len(targets)]] = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live_rows, "_BLOCK", 16)  # several blocks
        rows = LiveRows(head, coefficient if zeros else None, length)
    in_range = [0 <= label < 5 for label in targets]
    live = [
        row
        for row, label in enumerate(targets)
        if label != ignore_index and in_range[row] and not (row in zeros and zeros)
    ]
    assert int(rows.count) == len(live)
    assert rows.index.tolist() == live + [0] * (len(targets) - len(live))
    assert bool(rows.wrong) == any(
        not known and label != ignore_index for label, known in zip(targets, in_range, strict=True)
    )
    keys, order = rows.by_target()
    expected = sorted((place // length * 5 + targets[row], place) for place, row in enumerate(live))
    assert list(zip(keys.tolist(), order.tolist(), strict=True))[: len(live)] == expected

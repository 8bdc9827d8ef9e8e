"""Windows over time that a projection takes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.compiling import Rewritten
from tests.patterns.projected_recurrence.cases import (
    BATCH,
    INPUTS,
    STEPS,
    UNITS,
    arguments,
    call_of,
    own,
    pooled,
    without_gradients,
)


def test_windows_that_others_read_stay() -> None:
    def layer(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        windows = x.unfold(1, 2, 1).transpose(2, 3).flatten(2)
        return pooled(F.linear(windows, w.repeat(1, 2), b)), windows

    given = arguments(dtype=torch.float32)
    fast = Rewritten(layer)
    torch.testing.assert_close(without_gradients(fast, *given), layer(*given))
    assert call_of(fast).window == 2
    assert "unfold" not in own(fast)[0].nodes


def test_what_windows_are_of_must_not_change_before_the_op_reads_it() -> None:
    def layer(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        x = x.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1)
        windows = x.unfold(1, 2, 1).transpose(2, 3).flatten(2)  # a copy, where steps do not lie one after another
        y = F.linear(windows, w.repeat(1, 2), b)
        x.add_(1.0)
        return pooled(y), windows, x

    given = arguments(dtype=torch.float32)
    fast = Rewritten(layer)
    torch.testing.assert_close(without_gradients(fast, *given), layer(*given))
    (site,) = own(fast)
    assert site.status == "missed"
    assert "writes into a tensor that the nodes of this site read" in site.reason


def other_unfoldings(x: Tensor, kind: str) -> Tensor:
    if kind == "every other step":
        return x.unfold(1, 2, 2).transpose(2, 3).flatten(2)
    if kind == "inputs apart":
        return x.unfold(1, 2, 1).flatten(2)
    if kind == "turned to where they were":
        return x.unfold(1, 2, 1).permute(0, 1, 2, 3).flatten(2)
    return x.unfold(2, 2, 1).transpose(2, 3).flatten(2)


@pytest.mark.parametrize("kind", ["every other step", "inputs apart", "turned to where they were", "along the inputs"])
def test_what_is_no_window_over_time_is_written(kind: str) -> None:
    def layer(x: Tensor) -> Tensor:
        rows = other_unfoldings(x, kind)
        return pooled(F.linear(rows, torch.ones(3 * UNITS, rows.shape[2]) / 8))

    fast = Rewritten(layer)
    x = torch.randn(BATCH, STEPS, INPUTS)
    torch.testing.assert_close(without_gradients(fast, x), layer(x))
    assert call_of(fast).window == 1

"""Windows over time that a projection takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from structfly import compat
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


def assert_pinned(layer: Callable[..., tuple[Tensor, ...]]) -> None:
    """It is as it was, for what it reads is written before the op would read it."""
    given = arguments(dtype=torch.float32)
    fast = Rewritten(layer)
    torch.testing.assert_close(without_gradients(fast, *given), layer(*given))
    (site,) = own(fast)
    assert site.status == "missed"
    assert "writes into a tensor that the nodes of this site read" in site.reason


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

    assert_pinned(layer)


BESIDE: Mapping[str, Callable[[Tensor], tuple[Tensor, bool]]] = {
    "before": lambda x: (torch.cat([x.new_ones(BATCH, 2, INPUTS), x], 1), False),
    "one step before": lambda x: (torch.cat((x.new_ones(BATCH, 1, INPUTS), x), dim=-2), False),
    "after, back in time": lambda x: (torch.cat([x, x.new_ones(BATCH, 2, INPUTS)], 1), True),
    "zeros before": lambda x: (F.pad(x, (0, 0, 2, 0)), False),
    "zeros after, back in time": lambda x: (F.pad(x, (0, 0, 0, 1, 0, 0), value=0.0), True),
}
TOGETHER: Mapping[str, Callable[[Tensor], tuple[Tensor, bool]]] = {
    "after": lambda x: (torch.cat([x, x.new_ones(BATCH, 2, INPUTS)], 1), False),
    "before, back in time": lambda x: (torch.cat([x.new_ones(BATCH, 2, INPUTS), x], 1), True),
    "more than a window sees": lambda x: (torch.cat([x.new_ones(BATCH, 3, INPUTS), x], 1), False),
    "of another dtype": lambda x: (torch.cat([x.new_ones(BATCH, 2, INPUTS).bfloat16(), x], 1), False),
    "three parts": lambda x: (torch.cat([x[:, :1], x[:, :1], x], 1), False),
    "in other sequences": lambda x: (torch.cat([x, x], 0), False),
    "zeros after": lambda x: (F.pad(x, (0, 0, 0, 2)), False),
    "more zeros than a window sees": lambda x: (F.pad(x, (0, 0, 3, 0)), False),
    "zeros on both sides": lambda x: (F.pad(x, (0, 0, 1, 1)), False),
    "fewer steps": lambda x: (F.pad(x, (0, 0, -1, 0)), False),
    "more inputs": lambda x: (F.pad(x[..., 1:], (1, 0)), False),
    "ones": lambda x: (F.pad(x, (0, 0, 2, 0), value=1.0), False),
}


@pytest.mark.parametrize("kind", [*BESIDE, *TOGETHER])
def test_what_lies_beside_is_not_written_beside_it(kind: str) -> None:
    def layer(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        seen, reverse = {**BESIDE, **TOGETHER}[kind](x)
        return pooled(F.linear(seen.unfold(1, 3, 1).mT.flatten(2), w.repeat(1, 3), b), reverse=reverse)

    given = arguments(dtype=torch.float32)
    fast = Rewritten(layer)
    torch.testing.assert_close(without_gradients(fast, *given), layer(*given))
    assert (call_of(fast).window, call_of(fast).beside is not None) == (3, kind in BESIDE)
    (graph,) = fast.graphs
    graph.graph.eliminate_dead_code()  # what ones were like
    joins = [node for node in graph.graph.nodes if node.target in (torch.cat, F.pad, compat.PAD)]
    assert bool(joins) == (kind in TOGETHER)


def test_what_others_read_beside_each_other_stays() -> None:
    def layer(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        seen = F.pad(x, (0, 0, 1, 0))
        return pooled(F.linear(seen.unfold(1, 2, 1).mT.flatten(2), w.repeat(1, 2), b)), seen

    given = arguments(dtype=torch.float32)
    fast = Rewritten(layer)
    torch.testing.assert_close(without_gradients(fast, *given), layer(*given))
    assert (call_of(fast).window, call_of(fast).beside) == (2, None)


@pytest.mark.parametrize("place", [0, 1])
def test_what_is_joined_must_not_change_before_the_op_reads_it(place: int) -> None:
    def layer(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        parts = [x[:, :1].clone(), x.clone()]
        y = F.linear(torch.cat(parts, 1).unfold(1, 2, 1).mT.flatten(2), w.repeat(1, 2), b)
        parts[place].add_(1.0)
        return pooled(y), *parts

    assert_pinned(layer)


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

"""What a replay holds, and for how long."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from structfly.lowering.replay.recorder import Recorder
from structfly.lowering.replay.recording import Recording
from structfly.lowering.replay.replayed import replayed
from structfly.lowering.replay.steps import Fork, Join
from structfly.lowering.replay.values import Frame, Several, View

SHAPE = torch.Size((2,))


class Use:
    """A step that makes a memory if there is none, and notes which ones there are."""

    def __init__(self, memory: int, beside: Any, seen: list[set[int]]) -> None:
        self.memories, self.beside, self._seen = frozenset((memory,)), beside, seen
        self._memory = memory

    def __call__(self, frame: Frame) -> None:
        if frame.tensors[self._memory] is None:
            frame.hold(self._memory, torch.zeros(2))
        self._seen.append({memory for memory, tensor in enumerate(frame.tensors) if tensor is not None})


class NotedFork(Fork):
    """Asks nothing of a device, but notes as well."""

    beside: Any = None

    def __init__(self, seen: list[set[int]]) -> None:
        self._seen = seen

    def __call__(self, frame: Frame) -> None:
        self._seen.append({memory for memory, tensor in enumerate(frame.tensors) if tensor is not None})


class NotedJoin(Join):
    """The same."""

    beside: Any = None
    __init__ = NotedFork.__init__
    __call__ = NotedFork.__call__


@given(
    plan=st.lists(st.tuples(st.integers(1, 6), st.booleans()), min_size=1, max_size=12),
    windows=st.lists(st.integers(0, 4), max_size=4),
    results=st.sets(st.integers(1, 6), max_size=3),
)
def test_a_memory_is_let_go_of_after_its_last_use_unless_another_stream_works_beside(
    plan: list[tuple[int, bool]], windows: list[int], results: set[int]
) -> None:
    """Windows are lengths between a fork and a join, by turns; other streams work within forks and joins alone."""
    seen: list[set[int]] = []
    steps: list[Any] = []
    within: list[bool] = []
    lengths, forked = iter(windows), False
    left = next(lengths, None)
    for memory, beside in plan:
        while left == 0:
            steps.append(NotedJoin(seen) if forked else NotedFork(seen))
            forked = not forked
            within.append(forked)
            left = next(lengths, None)
        steps.append(Use(memory, SimpleNamespace() if beside and forked else None, seen))
        within.append(forked)
        left = None if left is None else left - 1
    used = {memory for memory, _ in plan}
    results &= used
    result = Several(tuple(View(each, 0, torch.float32, SHAPE, (1,)) for each in sorted(results)), list)
    done, made = Recording([], steps, result, 1, 7).replay([torch.ones(2)])
    assert done
    assert len(made) == len(results)
    for number, there in enumerate(seen):
        for memory in used:
            uses = [k for k, step in enumerate(steps) if memory in step.memories]
            last = uses[-1]
            if within[last]:  # until the other stream has been waited for
                last = next((k for k in range(last, len(steps)) if not within[k]), len(steps))
            expected = uses[0] <= number and (number <= last or memory in results)
            assert (memory in there) == expected


def test_a_replay_keeps_nothing(replays: list[Recording]) -> None:
    """Neither what it was given nor what it made."""

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2 + 1, x.new_zeros(3)

    run = replayed(function)
    for _ in range(2):
        run(torch.ones(3))
    given = torch.ones(3)
    made, zeros = run(given)
    gone = [weakref.ref(each) for each in (given, made, zeros)]
    del given, made, zeros
    assert len(replays) == 1
    assert all(each() is None for each in gone)


def test_recording_a_call_keeps_nothing_alive(replays: list[Recording]) -> None:
    """It would need more memory than the call itself."""
    alive: list[int] = []

    def function(x: Tensor) -> Tensor:
        made: list[weakref.ref[Any]] = []
        for _ in range(4):
            x = x + 1
            made.append(weakref.ref(x.untyped_storage()))
            alive.append(sum(each() is not None for each in made))
        return x

    run = replayed(function)
    for _ in range(3):
        assert run(torch.zeros(2)).tolist() == [4.0, 4.0]
    assert len(replays) == 1
    assert alive[4:] == alive[:4]


def test_streams_of_a_call_that_is_not_replayed_are_left_alone() -> None:
    """There may be no driver to tell of them."""
    recorder = Recorder([torch.ones(2)])
    recorder.why_not = "there is no driver"
    stream: Any = SimpleNamespace(cuda_stream=1)
    recorder.forked(stream)
    recorder.joined(stream)
    assert not recorder.steps

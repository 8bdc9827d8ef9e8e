"""A recorded call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from structfly.compat import current_stream
from structfly.lowering.replay.lookup import Lookup
from structfly.lowering.replay.steps import Fork, Join, Step
from structfly.lowering.replay.values import Frame, Value


class Recording:
    """What a call did, for replays in calls of the same form.

    Args:
        lookups: what is looked up before.
        steps: what is done.
        result: what the call gave.
        inputs: how many tensors it took.
        memories: how many there are, those of the inputs first.
    """

    def __init__(
        self, lookups: Sequence[Lookup], steps: Sequence[Step], result: Value, inputs: int, memories: int
    ) -> None:
        self._lookups, self._result, self._memories = lookups, result, memories
        self._steps = list(zip(steps, _last_uses(steps, result, inputs, memories), strict=True))

    def replay(self, inputs: Sequence[Tensor]) -> tuple[bool, Any]:
        """Do the same with other tensors on the current stream, and give what that made; (False, None), with nothing
        done, if what is looked up about them differs."""
        device = inputs[0].device
        stream = current_stream(device) if device.type == "cuda" else 0
        frame = Frame(inputs, self._memories, stream)
        if not all(lookup(frame) for lookup in self._lookups):
            return False, None
        tensors = frame.tensors
        for step, last_used in self._steps:
            step(frame)
            for memory in last_used:
                tensors[memory] = None
        return True, self._result.of(frame)


def _last_uses(steps: Sequence[Step], result: Value, inputs: int, memories: int) -> list[list[int]]:
    """The memories that are let go of after each step.

    While another stream works beside, nothing is: the allocator would give it to the next that asks, and the other
    stream does not wait for what this one launches meanwhile, nor this one for what the other does.
    """
    last = {memory: number for number, step in enumerate(steps) for memory in step.memories}
    used: list[list[int]] = [[] for _ in steps]
    for memory in sorted(set(range(inputs, memories)) & set(last) - result.memories):
        used[last[memory]].append(memory)
    let_go: list[list[int]] = []
    waiting: list[int] = []
    beside = False
    for step, each in zip(steps, used, strict=True):
        waiting += each
        beside = isinstance(step, Fork) or (beside and not isinstance(step, Join))
        let_go.append([] if beside else waiting)
        waiting = waiting if beside else []
    return let_go

"""What a recorded call looked up about tensors of indices, and each replay looks up again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from structfly.lowering.replay.forms import form_of
from structfly.lowering.replay.values import Frame, Value


class Lookup:
    """A lookup whose result, but for where its tensors lie and what they hold, all launches depend on.

    Args:
        look_up: what is called.
        arguments: what it takes.
        found: what it gave.
        memories: those of the tensors in that.
    """

    def __init__(
        self, look_up: Callable[..., Any], arguments: Sequence[Value], found: Any, memories: Sequence[int]
    ) -> None:
        self._look_up, self._arguments, self._memories = look_up, arguments, memories
        self._form, _ = form_of(found)

    def __call__(self, frame: Frame) -> bool:
        """Look it up again, and say whether the recording is for what is found."""
        found = self._look_up(*(each.of(frame) for each in self._arguments))
        form, tensors = form_of(found)
        if form != self._form:
            return False
        for memory, tensor in zip(self._memories, tensors, strict=True):
            frame.hold(memory, tensor)
        return True

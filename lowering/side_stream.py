"""Work beside the current stream's."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch

from structfly.lowering.replay.recorder import recorder


class SideStream:
    """A stream for work that needs nothing later than ``fork`` and is done at ``join``, if it is used."""

    def __init__(self, device: torch.device, *, used: bool) -> None:
        self._stream = _stream_of(device) if used and device.type == "cuda" else None
        if self._stream is not None:
            self._forked, self._joined = torch.cuda.Event(), torch.cuda.Event()
        self._context: AbstractContextManager[object] = nullcontext()

    def fork(self) -> None:
        """What has been launched so far comes before all work in this stream."""
        if self._stream is None:
            return
        self._forked.record(torch.cuda.current_stream())
        self._stream.wait_event(self._forked)
        if (recording := recorder()) is not None:
            recording.forked(self._stream)

    def __enter__(self) -> None:
        self._context = nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        self._context.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)

    def join(self) -> None:
        """The current stream waits for that work."""
        if self._stream is None:
            return
        self._joined.record(self._stream)
        torch.cuda.current_stream().wait_event(self._joined)
        if (recording := recorder()) is not None:
            recording.joined(self._stream)


@lru_cache(maxsize=16)
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)

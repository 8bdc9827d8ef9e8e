"""Replays on the CPU too, and counts of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from torch import Tensor

from structfly.lowering.replay import replayed
from structfly.lowering.replay.recording import Recording


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """What was replayed, call after call; on CPUs, where it gains nothing, calls are replayed as well."""
    seen: list[Recording] = []
    real = Recording.replay

    def replay(self: Recording, inputs: Sequence[Tensor]) -> tuple[bool, Any]:
        done, result = real(self, inputs)
        if done:
            seen.append(self)
        return done, result

    monkeypatch.setattr(replayed, "_replays", lambda device: True)
    monkeypatch.setattr(Recording, "replay", replay)
    return seen

"""What the cost model assumes of a device, where there is none: the names and settings are stand-ins."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from structfly.lowering.device_profile import device_profile

MATMUL = torch.backends.cuda.matmul


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    return torch.device("cuda", 0)


def test_tf32_is_seen_however_it_was_switched_on(h100: torch.device) -> None:
    def rate() -> float:
        return device_profile(h100).rate(torch.float32)

    everywhere: Any = torch.backends
    exact = rate()
    try:
        MATMUL.fp32_precision = "tf32"
        fast = rate()
        assert fast > 2 * exact
        MATMUL.fp32_precision = "ieee"
        assert rate() == exact
        MATMUL.fp32_precision = "none"
        everywhere.fp32_precision = "tf32"
        assert rate() == fast
        everywhere.fp32_precision = "none"
        MATMUL.allow_tf32 = True
        assert rate() == fast
        MATMUL.allow_tf32 = False
        assert rate() == exact
    finally:
        everywhere.fp32_precision = MATMUL.fp32_precision = "none"

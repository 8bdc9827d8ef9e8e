"""Products that are generated, on CPUs."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from structfly.lowering.block_products.support import why_no_products
from structfly.lowering.linear_recurrence import projected_steps
from structfly.lowering.linear_recurrence.projected import CUTS
from tests.lowering.linear_recurrence.test_projected import SMALL


@pytest.fixture
def _generated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in 16 bits are generated, and interpreted, on CPUs, in small programs."""

    def why(values: Tensor, sides: Iterable[int], tf32: bool) -> str:
        on_gpu: Any = SimpleNamespace(is_cuda=True, dtype=values.dtype, element_size=values.element_size)
        return why_no_products(on_gpu, sides, tf32)

    monkeypatch.setattr(projected_steps, "why_no_products", why)
    for order in CUTS:
        monkeypatch.setitem(CUTS, order, SMALL)

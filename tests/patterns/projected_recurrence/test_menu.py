"""Where both are made in one kernel, and why elsewhere not."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from structfly.lowering.linear_recurrence.projected_op import PROJECTED
from structfly.nn import QRNN
from tests.compiling import ALWAYS, Rewritten
from tests.oracle import assert_as_accurate
from tests.patterns.projected_recurrence.cases import (
    BATCH,
    arguments,
    own,
    pooled,
    without_gradients,
)

generated = pytest.mark.usefixtures("_generated")


@generated
@pytest.mark.parametrize("window", [1, 3])
def test_it_is_taken_where_products_are_generated(window: int) -> None:
    layer = QRNN(8, 8, window=window, bidirectional=True, dtype=torch.bfloat16)
    fast = Rewritten(layer, {"strict": True})
    x = torch.randn(BATCH, 40, 8).bfloat16()
    with torch.no_grad():
        made, expected, exact = fast(x)[0], layer(x)[0], copy.deepcopy(layer).double()(x.double())[0]
    assert_as_accurate(made, expected, exact, torch.bfloat16, "h")
    for site in own(fast):
        assert (site.status, site.candidate) == ("rewritten", "both in one")
        assert site.seconds is not None
        assert site.seconds_kept is not None
        assert site.seconds < site.seconds_kept
    assert len(own(fast)) == 2


KEPT: Mapping[str, tuple[dict[str, Any], str]] = {
    "too short": ({"steps": 15}, "15 steps are less than the 16 of one program"),
    "another order": ({"order": "zfoi"}, "measured faster in one are zf, zfo, and zfoi is not"),
    "sides": ({"units": 4}, "no product is generated of the operands: their sides, 8, 4, are no multiples of 16"),
    "float32": ({"dtype": torch.float32}, "no product is generated of the operands: they are torch.float32, of which"),
    "float64": ({"dtype": torch.float64}, "no product is generated of the operands: they are torch.float64"),
}


@generated
@pytest.mark.parametrize("case", KEPT)
def test_what_would_not_be_faster_is_kept(case: str) -> None:
    changes, reason = KEPT[case]
    options: dict[str, Any] = {"steps": 16, "inputs": 8, "units": 8, "dtype": torch.bfloat16, "order": "zfo", **changes}

    def layer(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return pooled(F.linear(x, w, b), options["order"], complement="i" not in options["order"])

    fast = Rewritten(layer, {"strict": True})
    without_gradients(fast, *arguments(**options))
    (site,) = own(fast)
    assert site.status == "kept"
    assert site.reason.startswith(reason)
    assert site.reason.endswith("; rewrite='always' overrides this")
    assert not fast.calls_of(PROJECTED)


@generated
@pytest.mark.parametrize(("steps", "status"), [(17, "kept"), (18, "rewritten")])
def test_steps_that_see_others_beside_are_none_of_the_kernel(steps: int, status: str) -> None:
    fast = Rewritten(QRNN(8, 8, window=3, dtype=torch.bfloat16), {"strict": True})
    without_gradients(fast, torch.randn(BATCH, steps, 8).bfloat16())
    assert [site.status for site in own(fast)] == [status], own(fast)


def test_on_a_cpu_it_is_kept() -> None:
    fast = Rewritten(QRNN(8, 8, dtype=torch.bfloat16), {"strict": True})
    without_gradients(fast, torch.randn(BATCH, 200, 8).bfloat16())
    (site,) = own(fast)
    assert (site.status, "they are on cpu" in site.reason) == ("kept", True)


def test_it_can_be_switched_off() -> None:
    fast = Rewritten(QRNN(8, 8), {**ALWAYS, "rules": {"projected_recurrence": False}})
    without_gradients(fast, torch.randn(BATCH, 9, 8))
    (site,) = own(fast)
    assert (site.status, "is switched off here" in site.reason) == ("kept", True)

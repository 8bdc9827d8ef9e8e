"""Loops over time in every spelling become one op, with eager's values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.compiling import Rewritten
from tests.oracle import assert_like_eager
from tests.patterns.linear_recurrence.programs import (
    COLLECTIONS,
    INITIALS,
    RESETS,
    SLICES,
    STEPS,
    Program,
    inputs,
    programs,
)

OP = torch.ops.structfly.linear_recurrence_v1.default

EACH = [
    *(Program(slices=name) for name in SLICES),
    *(Program(step=name, initial="given") for name in STEPS),
    *(Program(reset=name) for name in RESETS),
    *(Program(collection=name, final=True) for name in COLLECTIONS),
    *(Program(initial=name, final=True) for name in INITIALS),
    Program(step="difference the other way", reset="product", initial="given"),
    Program(step="in place", reset="where of zeros"),
    Program(backward=True, initial="given", final=True),
]


@pytest.mark.parametrize("program", EACH, ids=str)
def test_every_spelling_is_rewritten(program: Program) -> None:
    fast = Rewritten(program)
    assert_like_eager(fast, program, inputs())
    assert fast.statuses == ["rewritten"], fast.sites
    assert len(fast.calls_of(OP)) == 1


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(
    program=programs(),
    dtype=st.sampled_from((torch.float32, torch.float64, torch.bfloat16)),
    batch=st.integers(1, 3),
    steps=st.integers(6, 13),
    width=st.integers(1, 4),
)
def test_all_combinations(program: Program, dtype: torch.dtype, batch: int, steps: int, width: int) -> None:
    fast = Rewritten(program)
    assert_like_eager(fast, program, inputs(batch, steps, width, dtype), dtype)
    assert fast.statuses == ["rewritten"], fast.sites


def test_numbers_that_a_mask_chooses_have_the_dtype_of_the_state() -> None:
    """1.5 * 0.9 in float32 is not what it is in float64."""
    program = Program(step="scalar EMA", reset="masked_fill with a number")
    fast = Rewritten(program)
    assert_like_eager(fast, program, inputs(dtype=torch.float64), torch.float64)
    assert fast.statuses == ["rewritten"], fast.sites

"""Budgets: what is a ratio, what an amount, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from structfly import Budget
from structfly.config.budget import Limit
from structfly.errors import ConfigError


def test_floats_are_ratios_and_the_rest_amounts() -> None:
    budget = Budget(params=0.5, flops=10**9, weight_bytes="16MiB", activation_bytes=1.1, time="2.5ms", loss=0.1)
    assert budget.limits == {
        "params": Limit(ratio=0.5),
        "flops": Limit(amount=10**9),
        "weight_bytes": Limit(amount=16 * 2**20),
        "activation_bytes": Limit(ratio=1.1),
        "time": Limit(amount=0.0025),
    }
    assert budget.loss == 0.1
    assert [limit.of(1000.0) for limit in budget.limits.values()] == [500.0, 1e9, 2.0**24, 1100.0, 0.0025]


def test_a_budget_is_read_back_from_what_it_gives() -> None:
    budget = Budget(params=0.5, flops=10**9, weight_bytes="16MiB", time="2.5ms", loss=0)
    assert Budget(**budget.model_dump(exclude_none=True)) == budget


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "at least one limit of params, flops, weight_bytes, activation_bytes, time, loss"),
        ({"params": None}, "at least one limit"),
        ({"param": 0.5}, "param is unknown; allowed: params"),
        ({"params": 0.0}, "params is 0.0; allowed: a ratio"),
        ({"params": -1}, "params is -1; allowed: a ratio"),
        ({"params": True}, "params is True; allowed: a ratio"),
        ({"params": "half"}, "params is 'half'; allowed: a ratio"),
        ({"flops": float("inf")}, "flops is inf; allowed: a ratio"),
        ({"weight_bytes": "16"}, "weight_bytes is '16'; allowed: a whole number of bytes"),
        ({"time": 3}, "time is 3; allowed: a ratio of the dense layers' as a float above 0, a string such as"),
        ({"time": "3 minutes"}, "time is '3 minutes'; allowed"),
        ({"loss": -0.1}, "loss is -0.1; allowed: a number of at least 0"),
    ],
)
def test_wrong_budgets_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Budget(**given)

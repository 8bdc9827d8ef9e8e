"""The benchmark of what stands before calls: what is held against what."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest

from benchmarks import work_before
from benchmarks.structured_case import Case
from benchmarks.work_before import Work, case_table, measure_case
from structfly import measure
from structfly.records.layer import LayerSizes

CASE = Case(10, LayerSizes(64, 256), "bfloat16", "cuda", training=False)
WORKS = (Work(5e-3, own=False), Work(20e-3, own=True))
SECONDS = {("dense", WORKS[0]): 4.0, ("dense", WORKS[1]): 6.0, ("layer", WORKS[0]): 2.0, ("layer", WORKS[1]): 1.0}


@pytest.fixture
def clocked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times that a table has, by the call and the work before it."""

    def befores(calls: Mapping[str, Any], works: Any) -> dict[tuple[str, Work], Callable[[], Any]]:
        return {(name, work): partial(int, SECONDS[name, work]) for name in calls for work in works}

    def times(calls: Mapping[str, Any], device: str, *, before: Mapping[str, Any], repeats: int) -> dict[str, Any]:
        return {turn: measure.summarize([float(before[turn]())] * repeats) for turn in calls}

    monkeypatch.setattr(work_before, "befores", befores)
    monkeypatch.setattr(measure, "times_in_rotation", times)


@pytest.mark.usefixtures("clocked")
def test_a_layer_is_held_against_the_dense_one_behind_the_same_work() -> None:
    rows = measure_case(CASE, {"dense": int, "layer": int}, WORKS, repeats=3)
    found = {(row.provider, row.mode.partition(", behind ")[2]): row for row in rows if row.metric == "x_dense"}
    assert {key: row.p50 for key, row in found.items()} == {
        ("dense", "5 ms of products"): 1.0,
        ("dense", "20 ms of its own calls"): 1.0,
        ("layer", "5 ms of products"): 2.0,
        ("layer", "20 ms of its own calls"): 6.0,
    }
    assert all(len(row.samples) == 3 for row in rows)
    (_, products, own) = case_table(CASE, rows, WORKS).columns
    assert list(products.cells) == ["4000.000 1.000", "2000.000 2.000"]
    assert list(own.cells) == ["6000.000 1.000", "1000.000 6.000"]

"""Plans as files: what is saved is read back, and what is wrong in one is named with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from structfly import Budget, Plan
from structfly.config.json_lines import line_of
from structfly.errors import PlanError
from structfly.patterns.low_rank import LowRank
from tests.restructure.test_restructure import plan_for


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_for(Budget(params=0.6, time=1.5), structures=["low_rank"], timing_seconds=0)


def test_a_plan_is_read_back_as_it_was(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_a_plan_prints_as_a_table(plan: Plan) -> None:
    text = str(plan)
    for expected in ("up", "32 -> 64", "LowRank(rank=", "loss predicted to rise by", "measured: 0 dense", "kept"):
        assert expected in text
    assert "left: lm_head: it is the head" in text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"name": "low_rank"', '"name": "lowrank"', r"layers\.\w+\.structure: name is 'lowrank'; allowed: low_rank"),
        ('"rank": ', '"rnk": ', "rnk is unknown; low_rank takes rank, rematerialise"),
        ('"rank": ', '"rank": 1000000, "x": ', "x is unknown"),
        ('"in_features": 32', '"in_features": "32"', "layers.up.in_features: Input should be a valid integer"),
        ('"in_features": 32', '"infeatures": 32', "layers.up.infeatures: .*it is unknown, remove it"),
        ('"format": 1', '"format": 2', "format: Input should be less than or equal to 1"),
        ('"strategy"', "strategy", "no JSON"),
    ],
)
def test_an_edit_with_an_error_is_refused_with_its_line(
    plan: Plan, tmp_path: Path, old: str, new: str, message: str
) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    line = text[: text.index(old)].count("\n") + 1
    with pytest.raises(PlanError, match=message) as caught:
        Plan.load(path)
    numbers = {int(part.split(":")[0]) for part in str(caught.value).split("line ")[1:]}
    # An unknown or missing key is named where it stands, or where the table that it belongs to begins.
    assert numbers & set(range(line - 3, line + 1)), caught.value


def test_a_structure_that_does_not_fit_is_refused_with_its_line(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    text = path.read_text()
    rank = next(layer.structure.rank for layer in plan.layers.values() if isinstance(layer.structure, LowRank))
    path.write_text(text.replace(f'"rank": {rank}', '"rank": 33', 1))
    with pytest.raises(PlanError, match=r"line \d+: layers\.\w+\.structure is LowRank\(rank=33, .*rank is at most"):
        Plan.load(path)


values = st.recursive(
    st.one_of(st.integers(), st.text(max_size=4), st.booleans(), st.none(), st.floats(allow_nan=False)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=12,
)


@given(value=values, data=st.data(), indent=st.sampled_from((None, 1, 4)))
def test_line_of_any_value(value: object, data: st.DataObject, indent: int | None) -> None:
    """The line is that on which the value's text begins."""
    path: list[int | str] = []
    marked: object = value
    while isinstance(marked, (dict, list)) and marked and data.draw(st.booleans()):
        keys = list(marked) if isinstance(marked, dict) else list(range(len(marked)))
        path.append(data.draw(st.sampled_from(keys)))
        marked = marked[path[-1]]  # type: ignore[index]
    text = json.dumps(value, indent=indent)
    mark = "a mark that nothing else has"

    def with_mark(inner: object, rest: list[int | str]) -> object:
        if not rest:
            return mark
        copy: Any = dict(inner) if isinstance(inner, dict) else list(inner)  # type: ignore[call-overload]
        copy[rest[0]] = with_mark(copy[rest[0]], rest[1:])
        return copy

    where = json.dumps(with_mark(value, path), indent=indent).index(mark)
    expected = json.dumps(with_mark(value, path), indent=indent)[:where].count("\n") + 1
    assert line_of(text, path) == expected
    assert line_of(text, [*path, "no such key"]) >= expected

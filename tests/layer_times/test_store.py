"""Files of measured times: read, added to, refused."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from structfly.errors import ConfigError, StructflyError
from structfly.layer_times import store
from structfly.layer_times.store import (
    Origin,
    TimedLayer,
    TimesFile,
    add_times,
    keep_times,
    known_times,
    precision_of,
    read_times,
)
from structfly.patterns.low_rank import LowRank
from structfly.patterns.monarch import Monarch
from structfly.patterns.structure import Structure
from structfly.records.layer import LayerSizes
from tests.layer_times.fabricated import HERE, entry, keep

SIZES = LayerSizes(32, 64)
SETTINGS: list[Structure] = [LowRank(rank=3), LowRank(rank=4), Monarch(blocks_in=4, blocks_out=4, block_rank=2)]

relative = st.dictionaries(st.sampled_from(SETTINGS), st.floats(0.01, 100.0))
entries = st.builds(
    entry,
    st.just(SIZES),
    st.integers(1, 3),
    relative,
    dense=st.floats(1e-7, 10.0),
    passes=st.sampled_from(["forward", "training"]),
    origin=st.sampled_from([HERE, HERE._replace(device="another")]),
)


@given(added=st.lists(st.lists(entries, max_size=4), max_size=3))
def test_what_is_added_is_read_again_and_the_newest_counts(added: list[list[TimedLayer]]) -> None:
    keep()
    path, expected, dense = store.user_path(), dict[Any, float](), dict[Any, float]()
    for some in added:
        add_times(path, some)
        for each in some:
            dense[each.origin, each.key] = each.dense
            expected |= {(each.origin, each.key, structure): time for structure, time in each.relative.items()}
    found = read_times(path).layers
    assert {(each.origin, each.key): each.dense for each in found} == dense
    assert {(each.origin, each.key, s): time for each in found for s, time in each.relative.items()} == expected


def test_no_file_is_an_empty_one_and_nothing_new_writes_none(tmp_path: Path) -> None:
    assert read_times(tmp_path / "times.json") == TimesFile()
    keep_times([])
    assert not store.user_path().exists()


def written(tmp_path: Path, **changes: Any) -> Path:
    one = entry(SIZES, 8, {SETTINGS[0]: 0.5}).model_dump(mode="json")
    path = tmp_path / "times.json"
    path.write_text(json.dumps({"format": 1, "layers": [{**one, **changes}]}, indent=1))
    return path


WRONG = {
    "tokens": (0, "line 12: layers.0.tokens: Input should be greater than or equal to 1"),
    "dense": ("fast", "line 13: layers.0.dense: Input should be a valid number"),
    "precision": ("int8", "line 8: layers.0.precision: Input should be 'float64'"),
    "colour": (3, "layers.0.colour: Extra inputs are not permitted; it is unknown, remove it"),
    "structures": ([{"structure": {"name": "lowrank", "rank": 3}, "relative": 1.0}], "name is 'lowrank'; allowed: low"),
    "in_features": (2, "structures has LowRank(rank=3, rematerialise=False); rank is at most 2 there"),
}


@pytest.mark.parametrize("field", WRONG)
def test_what_is_wrong_is_named_with_its_line_and_a_remedy(field: str, tmp_path: Path) -> None:
    value, message = WRONG[field]
    path = written(tmp_path, **{field: value})
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        read_times(path)
    assert str(caught.value).startswith(f"{path}, line ")
    assert str(caught.value).endswith("mend it, or remove it and measure again")
    with pytest.raises(ConfigError):
        add_times(path, [entry(SIZES, 8, {})])


def test_two_entries_of_one_layer_are_refused() -> None:
    one = entry(SIZES, 8, {})
    with pytest.raises(ValueError, match=r"layers\.1 is of the same layer as layers\.0; remove one"):
        TimesFile(layers=(one, one))
    for field, layer in (
        ("structures", {"structure": SETTINGS[0], "relative": 1.0}),
        ("ops", {"op": "low_rank_v3", "factors": ((3, 32), (64, 3)), "relative": 1.0}),
    ):
        with pytest.raises(ValueError, match="a layer twice"):
            TimedLayer.model_validate(one.model_dump() | {field: (layer, layer)})


def test_a_folder_that_cannot_be_written_is_said_in_the_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "times.json"
    monkeypatch.setattr(store, "user_path", lambda: path)
    with pytest.raises(StructflyError, match="measured times of layers cannot be kept"):
        add_times(path, [entry(SIZES, 8, {})])
    with caplog.at_level(logging.WARNING, "structfly"):
        keep_times([entry(SIZES, 8, {})])
    assert "STRUCTFLY_CACHE_DIR" in caplog.text


def test_shipped_times_are_of_any_torch_and_the_users_count_more(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = TimesFile(
        layers=(
            entry(SIZES, 8, {SETTINGS[0]: 0.5, SETTINGS[1]: 0.7}, origin=HERE._replace(torch="2.0")),
            entry(SIZES, 8, {SETTINGS[0]: 9.0}, origin=Origin("another", *HERE[1:])),
        )
    )
    monkeypatch.setattr(store, "shipped_files", lambda: iter([shipped]))
    users = TimesFile(layers=(entry(SIZES, 8, {SETTINGS[0]: 2.0}), entry(SIZES, 8, {}, origin=Origin("x", "y", "z"))))
    assert list(known_times(HERE, users)) == [shipped.layers[0], users.layers[0]]


def test_what_is_shipped_can_be_read() -> None:
    for file in store.shipped_files():
        assert file.layers


def test_tf32_is_a_precision_of_its_own() -> None:
    matmul = torch.backends.cuda.matmul
    assert precision_of(torch.float32, "cuda") == "float32"
    try:
        matmul.fp32_precision = "tf32"
        assert precision_of(torch.float32, "cuda") == "tf32"
        assert precision_of(torch.float32, "cpu") == "float32"
    finally:
        matmul.fp32_precision = "none"
    assert precision_of(torch.bfloat16, "cuda") == "bfloat16"
    assert precision_of(torch.float8_e5m2, "cuda") is None

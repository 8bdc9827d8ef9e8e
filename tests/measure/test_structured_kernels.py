"""The benchmark of a structured layer's kernels: what bounds them, and what is written of them."""

from __future__ import annotations

import pytest
import torch

from benchmarks.device_trace import Kernel
from benchmarks.structured_case import Case, make_layer
from benchmarks.structured_kernels import Rates, least, rows_of, table_of
from benchmarks.structured_layers import Place, dense, structured
from structfly.records.layer import LayerSizes


def case(*, training: bool) -> Case:
    return Case(10, LayerSizes(64, 256), "bfloat16", "cpu", training)


@pytest.mark.parametrize(("training", "products", "numbers"), [(False, 1, 64 + 256), (True, 3, 3 * (64 + 256))])
def test_what_a_step_takes_at_least(training: bool, products: int, numbers: int) -> None:
    layer = make_layer(dense(), case(training=training).sizes, Place("cpu", torch.bfloat16))
    found = least(case(training=training), layer, Rates(1e6, 1e3))
    assert found == pytest.approx(
        {"multiplying_s": products * 2 * 10 * 64 * 256 / 1e6, "moving_s": 10 * numbers * 2 / 1e3}
    )


def test_a_structured_layer_multiplies_less() -> None:
    layers = [
        make_layer(provider, LayerSizes(64, 256), Place("cpu", torch.bfloat16))
        for provider in (dense(), structured(None)["monarch, 4 blocks"])
    ]
    full, less = (least(case(training=True), layer, Rates(1.0, 1.0)) for layer in layers)
    assert less["multiplying_s"] == pytest.approx(full["multiplying_s"] * (1 + 64 / 256) / 4)
    assert less["moving_s"] == full["moving_s"]


def test_kernels_are_numbered_and_runs_of_one_are_a_line() -> None:
    kernels = [Kernel(name, (1e-6, 2e-6, 3e-6)) for name in ("a", "b", "b", "a")]
    rows = rows_of(case(training=True), "layer", kernels, {"moving_s": 1e-6})
    assert [row.metric for row in rows] == [*(f"device_s of {n}: {k}" for n, k in enumerate("abba", 1)), "moving_s"]
    assert [row.p50 for row in rows] == pytest.approx([2e-6] * 4 + [1e-6])
    columns = [list(column.cells) for column in table_of(rows).columns]
    assert columns == [
        ["a", "b", "a", "moving_s", "all kernels"],
        ["1", "2", "1", "1", ""],
        ["2.0", "4.0", "2.0", "1.0", "8.0"],
    ]

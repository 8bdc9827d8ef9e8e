"""The benchmark of layers that are recognised: what it writes, and that each layer is one that a rule reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import recognised
from benchmarks.recognised import LAYERS, SHARE, errors, made
from benchmarks.structured_case import Case, Layer, make_inputs, step
from benchmarks.structured_layers import Place
from structfly.records.layer import LayerSizes
from tests.compiling import Rewritten

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own deprecations
SIZES, HERE = LayerSizes(256, 256), Place("cpu", torch.float32)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("masked linear, a quarter", "masked_linear"),
        ("monarch 4, einsum", "batched_chain"),
        ("monarch 16, einsum", "batched_chain"),
        ("gblr, dense weight", "factored_linear"),
        ("low rank, dense weight", "factored_linear"),
        ("butterfly", "batched_chain"),
    ],
)
def test_every_layer_is_recognised(name: str, rule: str) -> None:
    layer, x = made(LAYERS[name], SIZES, HERE), torch.randn(5, SIZES.in_features)
    fast = Rewritten(layer)
    torch.testing.assert_close(fast(x), layer(x), rtol=1e-4, atol=1e-4)
    assert [(site.rule, site.status) for site in fast.sites] == [(rule, "rewritten")]


def test_the_share_that_is_kept() -> None:
    masked = made(LAYERS["masked linear, a quarter"], SIZES, HERE)
    assert masked.get_buffer("mask").mean().item() == SHARE
    gblr = made(LAYERS["gblr, dense weight"], SIZES, HERE)
    kept = sum(float(gblr.get_buffer(name).sum()) for name in ("rows", "columns"))
    assert kept / SIZES.parameters == pytest.approx(SHARE, abs=0.01)


@pytest.mark.parametrize("training", [False, True])
def test_errors_are_those_of_the_step(training: bool) -> None:
    case = Case(12, SIZES, "float32", "cpu", training)
    x, upstream = make_inputs(case)
    layer = made(LAYERS["low rank, dense weight"], SIZES, HERE)

    def wrong(x: Tensor) -> Tensor:
        return 1.01 * layer(x)  # type: ignore[no-any-return]

    for run, expected in ((layer, 0.0), (wrong, 0.01)):
        under_test = Layer(layer, run, trains=True)
        y = step(under_test, x, upstream, training=training)
        found = errors(under_test, y, x, upstream, training=training)
        assert found.keys() == ({"y", "dx", "dfactors"} if training else {"y"})
        assert all(error == pytest.approx(expected, abs=1e-5) for error in found.values())


def test_what_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["low rank, dense weight", "butterfly"]
    given = ["--device", "cpu", "--shapes", "16x64x96", "--repeats", "1", "--output", str(tmp_path / "made")]
    assert recognised.main([*given, "--passes", "forward+backward", "--layers", *names]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "butterfly is left out: a butterfly of" in printed
    assert "low rank, dense weight: factored_linear: " in printed
    rows = json.loads((tmp_path / "made.json").read_text())["rows"]
    known = {(row["kernel"], row["provider"], row["metric"]): row["p50"] for row in rows}
    for provider in ("dense", "inductor", "structfly"):
        assert known[names[0], provider, "time_s"] > 0
        for what in ("y", "dx", "dfactors"):
            assert known[names[0], provider, f"relative_error_{what}"] < 1e-5
    assert known[names[0], "inductor", "x_inductor"] == 1
    assert not [key for key in known if key[0] == names[1]]

"""The benchmark of structured layers: what its layers are, what it holds them to, and what it writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks import recording, structured_layers, structured_linear
from benchmarks.recording import Row
from benchmarks.structured_case import Case, Layer, errors, make_inputs, make_layer, step
from benchmarks.structured_layers import BARS, DENSE, GBLR, SETTINGS, TWO_PRODUCTS, Place, Provider, dense_weight
from benchmarks.structured_peers import PEERS, BatchedMonarch
from structfly import StructuredLinear
from structfly.measure import summarize
from structfly.patterns.gblr_learned import GaudiGBLR
from structfly.records.layer import LayerSizes

HERE = Place("cpu", torch.float64)
HERE_ALONE = ("torch-structured", "blksprs", "torch 2:4")  # peers that need a package or a GPU


def case(*, training: bool) -> Case:
    return Case(12, LayerSizes(256, 512), "float32", "cpu", training)


@pytest.mark.filterwarnings("ignore:Sparse BSR")
@pytest.mark.parametrize("name", [name for name in PEERS if not name.startswith(HERE_ALONE)])
def test_a_peer_multiplies_by_the_weight_that_it_names(name: str) -> None:
    torch.manual_seed(0)
    layer = PEERS[name].build(LayerSizes(256, 512), HERE)
    x = torch.randn(5, 256, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ dense_weight(layer).t())


@settings(max_examples=20, deadline=None)
@given(blocks=st.sampled_from([1, 2, 4]), inputs=st.integers(1, 6), outputs=st.integers(1, 6), tokens=st.integers(1, 4))
def test_batched_monarch_is_one_matrix(blocks: int, inputs: int, outputs: int, tokens: int) -> None:
    sizes = LayerSizes(inputs * blocks, outputs * blocks)
    layer = BatchedMonarch(blocks, sizes, HERE)
    x = torch.randn(tokens, sizes.in_features, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ layer.to_dense().t())


def test_the_settings_have_the_parameters_that_their_bars_are_about() -> None:
    def share(name: str, *sizes: int) -> float:
        made = SETTINGS[name](LayerSizes(*sizes))
        return float(made.cost(LayerSizes(*sizes), torch.bfloat16).parameters) / LayerSizes(*sizes).parameters

    assert share("monarch, 4 blocks", 4096, 4096) == 2 / 4
    assert share("monarch, 16 blocks", 4096, 16384) == (1 + 4096 / 16384) / 16
    thin = 128 * 8192 / 4096**2
    assert share("pixelfly, grid 16, 3 factors, rank 128", 4096, 4096) == pytest.approx(1 / 4 + thin, abs=1e-6)
    assert share("pixelfly, grid 64, 6 factors, rank 128", 4096, 4096) == pytest.approx(7 / 64 + thin, abs=1e-6)
    thin = 64 * (768 + 3072) / (768 * 3072)
    assert share("pixelfly, grid 8, 2 factors, rank 64", 768, 3072) == pytest.approx(3 / 8 + thin, abs=1e-6)
    for sizes in ((4096, 4096), (4096, 16384), (768, 3072)):
        assert share("low rank, a quarter", *sizes) == pytest.approx(0.25, abs=0.012)


def test_every_bar_is_of_a_provider() -> None:
    ours = {*SETTINGS, GBLR}
    for shape, bars in BARS.items():
        tokens, *sizes = map(int, shape.split("x"))
        assert set(bars) <= ours
        for name in bars.keys() & SETTINGS.keys():
            assert not SETTINGS[name](LayerSizes(*sizes)).why_not(LayerSizes(*sizes))
        assert Case(tokens, LayerSizes(*sizes), "bfloat16", "cuda", True).bars == bars
        assert not Case(tokens, LayerSizes(*sizes), "float32", "cuda", True).bars


def test_masks_of_a_result_are_those_of_the_layer(tmp_path: Path) -> None:
    spans = {"output_starts": 24.0, "output_lengths": 48.0, "input_starts": 16.0, "input_lengths": 8.0}
    rows = [
        Row.of_timing(summarize([value] * 3), kernel="gblr_training", provider="one", mode="64 -> 96", metric=name)
        for name, value in spans.items()
    ]
    recording.write(tmp_path / "run", rows, environment={}, command="")
    layer = structured_layers.of_masks(tmp_path / "run.json")(LayerSizes(64, 96), HERE)
    assert isinstance(layer, StructuredLinear)
    inside = torch.zeros(96, 64, dtype=torch.bool)
    inside[24:72, 16:24] = True
    assert torch.equal(layer.to_dense() != 0, inside)


def test_masks_without_a_file_have_a_quarter_of_the_parameters() -> None:
    made: list[GaudiGBLR] = []

    class Kept(GaudiGBLR):
        def finalise(self, *tiles: Any, **options: Any) -> nn.Module:
            made.append(self)
            return super().finalise(*tiles, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(structured_layers, "GaudiGBLR", Kept)
        structured_layers.of_masks(None)(LayerSizes(64, 96), HERE)
    of_masks = sum(int((mask.abs() > 1e-3).sum()) for mask in made[0].masks())
    assert of_masks / (64 * 96) == pytest.approx(0.25, abs=0.02)


class Doubled(nn.Linear):
    """Says that its weight is what it is not."""

    def forward(self, x: Tensor) -> Tensor:
        return 1.01 * super().forward(x)


@pytest.mark.parametrize("training", [False, True])
def test_errors_are_those_of_the_step(training: bool) -> None:
    problem = case(training=training)
    x, upstream = make_inputs(problem)
    for kind, expected in ((nn.Linear, 0.0), (Doubled, 0.01)):
        layer = kind(256, 512, bias=False)
        under_test = Layer(layer, layer, trains=True)
        y = step(under_test, x, upstream, training=training)
        found = errors(under_test, y, x, upstream, training=training)
        assert found.keys() == ({"y", "dx", "dfactors"} if training else {"y"})
        assert all(error == pytest.approx(expected, abs=1e-5) for error in found.values())
    if training:
        layer.weight.grad = None
        with pytest.raises(ValueError, match="left no gradient"):
            errors(under_test, y, x, upstream, training=True)


def test_tf32_is_about_float32() -> None:
    assert replace(case(training=False), tf32=True).mode == "12x256x512 float32 as TF32, forward"
    assert not structured_linear.parse_arguments(["--dtype", "float32"]).tf32
    assert structured_linear.parse_arguments(["--dtype", "float32", "--tf32"]).tf32
    with pytest.raises(SystemExit):
        structured_linear.parse_arguments(["--dtype", "bfloat16", "--tf32"])
    before = torch.get_float32_matmul_precision()
    for tf32, word in ((False, "highest"), (True, "high")):
        with structured_linear.precise(tf32=tf32):
            assert torch.get_float32_matmul_precision() == word
    assert torch.get_float32_matmul_precision() == before


def test_what_is_wanted() -> None:
    forward, training = (
        Case(16384, LayerSizes(4096, 4096), "bfloat16", "cuda", training) for training in (False, True)
    )
    x_dense = {DENSE: 1.0, TWO_PRODUCTS: 3.0}
    assert structured_linear.wanted("monarch, 4 blocks", forward, x_dense, 2.0) == 1.7
    assert structured_linear.wanted("monarch, 4 blocks", training, x_dense, 2.0) == 1.6
    assert structured_linear.wanted("low rank, a quarter", forward, x_dense, 4.0) == pytest.approx(0.98 * 3)
    assert structured_linear.wanted("low rank, a quarter", forward, {DENSE: 1.0}, 4.0) is None
    assert structured_linear.wanted(GBLR, forward, x_dense, 1.6) == 1.5
    assert structured_linear.wanted(GBLR, forward, x_dense, 4.0) == 3.0
    assert structured_linear.wanted(DENSE, forward, x_dense, 1.0) is None
    assert structured_linear.wanted("monarch, 4 blocks", replace(forward, tokens=1), x_dense, 2.0) is None


def rows_of(x_dense: float, memory: float, passes: str = "forward+backward") -> list[Row]:
    values = {"x_dense": x_dense, "x_dense_wanted": 2.0, "peak_extra_bytes": memory, "time_s": 1.0}
    of = {"kernel": "k", "mode": f"m, {passes}"}
    ours = [Row.of_value(value, provider="p", metric=metric, **of) for metric, value in values.items()]
    values = {"x_dense": 1.0, "peak_extra_bytes": 100.0, "time_s": 2.0}
    return [*ours, *(Row.of_value(value, provider=DENSE, metric=metric, **of) for metric, value in values.items())]


@pytest.mark.parametrize(
    ("rows", "missed", "reached"),
    [
        (rows_of(2.0, 99.0), [], "yes"),
        (rows_of(1.9, 99.0), ["is 1.90 x dense, must be 2.00"], "NO"),
        (rows_of(2.1, 100.0), ["takes 1.000 of the dense layer's memory"], "yes"),
        (rows_of(2.1, 100.0, "forward"), [], "yes"),
    ],
)
def test_misses(rows: list[Row], missed: list[str], reached: str) -> None:
    lines = structured_linear.misses(rows)
    assert len(lines) == len(missed)
    assert all(part in line for part, line in zip(missed, lines, strict=True))
    table = structured_linear.case_table(rows)
    (cells,) = (list(column.cells) for column in table.columns if column.header == "reached")
    assert cells == [reached, ""]


def test_a_failure_of_ours_is_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(sizes: LayerSizes, place: Place) -> nn.Module:
        raise RuntimeError("broken")

    broken = {DENSE: Provider(build, None)}
    x, upstream = make_inputs(case(training=False))
    with pytest.raises(RuntimeError, match="broken"):
        structured_linear.layers_of(case(training=False), broken, x, upstream, print)
    said: list[str] = []
    assert structured_linear.layers_of(case(training=False), {"peer": broken[DENSE]}, x, upstream, said.append)[0] == {}
    assert said == ["peer is left out: RuntimeError: broken"]


# Inductor's workers and Dynamo warn of torch's own deprecations.
@pytest.mark.filterwarnings("ignore")
def test_all_structures_are_measured_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--device", "cpu", "--shapes", "16x256x128", "--repeats", "1", "--output", str(tmp_path / "made")]
    ours = [*SETTINGS, GBLR]
    assert structured_linear.main([*given, "--providers", *ours, TWO_PRODUCTS, "torch 2:4"]) == 0
    printed = capsys.readouterr().out
    assert "torch 2:4 is left out: ValueError" in printed
    assert "rank is at most 128 there" in " ".join(printed.split())  # BLAST's
    rows = json.loads((tmp_path / "made.json").read_text())["rows"]
    known = {(row["mode"], row["provider"], row["metric"]): row["p50"] for row in rows}
    fitting = [DENSE, TWO_PRODUCTS, *(name for name in ours if "blast" not in name)]
    for passes, metrics in {"forward": ["y"], "forward+backward": ["y", "dx", "dfactors"]}.items():
        mode = f"16x256x128 float32, {passes}"
        for name in fitting:
            assert known[mode, name, "time_s"] > 0
            assert known[mode, name, "share_of_parameters"] > 0
            assert all(known[mode, name, f"relative_error_{what}"] < 1e-5 for what in metrics)
        assert known[mode, DENSE, "x_dense"] == 1.0


@pytest.mark.filterwarnings("ignore")
def test_a_layer_is_what_its_provider_says() -> None:
    provider = structured_layers.structured(None)["low rank, a quarter"]
    layer = make_layer(provider, LayerSizes(256, 128), Place("cpu", torch.float32))
    assert isinstance(layer.module, StructuredLinear)
    assert layer.allowed == pytest.approx(1 / layer.share_of_parameters)
    dense = make_layer(structured_layers.dense(), LayerSizes(256, 128), Place("cpu", torch.float32))
    assert (dense.allowed, dense.share_of_parameters) == (1.0, 1.0)

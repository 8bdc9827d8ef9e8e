"""README.md and docs: their code runs, their links lead somewhere, and their figures are committed results."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks.structured_layers import GBLR, SETTINGS
from benchmarks.structured_peers import PEERS
from structfly import Budget
from structfly.layer_times.store import TimesFile
from structfly.lowering.gemm import Tiles
from structfly.lowering.tuning.table import Table
from structfly.patterns.structures import STRUCTURES

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    *(ROOT / "docs").glob("*.md"),
]


def code(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


# Compiling a Hugging Face model and running Inductor's workers warn about torch's own deprecations.
@pytest.mark.filterwarnings("ignore")
def test_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    name = "readme_example"
    blocks = [block for block in code(ROOT / "README.md", "python") if "backend=" not in block.splitlines()[0]]
    first, *rest = blocks
    namespace: dict[str, Any] = {"__name__": name}
    for block in (first, *rest):
        exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert printed.count("rewritten") >= 1
    assert printed.count("linear_cross_entropy") >= 2


def test_the_page_of_the_ops_runs() -> None:
    namespace: dict[str, Any] = {}
    for block in code(ROOT / "docs" / "ops.md", "python"):
        exec(compile(block, "docs/ops.md", "exec"), namespace)


@pytest.mark.filterwarnings("ignore")  # torch's own deprecations
def test_the_page_on_structured_code_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    page = ModuleType("page_on_structured_code")
    monkeypatch.setitem(sys.modules, "page_on_structured_code", page)  # for torch.compile to find
    for block in code(ROOT / "docs" / "structured_code.md", "python"):
        exec(compile(block, "docs/structured_code.md", "exec"), vars(page))


# Inductor's workers warn about torch's own deprecations.
@pytest.mark.filterwarnings("ignore")
def test_the_page_on_restructuring_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    page = ModuleType("page_on_restructuring")
    monkeypatch.setitem(sys.modules, "page_on_restructuring", page)  # for torch.compile to find
    torch.manual_seed(0)
    for block in code(ROOT / "docs" / "restructure.md", "python"):
        exec(compile(block, "docs/restructure.md", "exec"), vars(page))
    printed = capsys.readouterr().out
    assert "loss predicted to rise by" in printed
    predicted = [float(found) for found in re.findall(r"^\d0%: predicted (\S+), measured \S+$", printed, re.MULTILINE)]
    assert len(predicted) == 3
    assert "times of layers: " in printed
    assert predicted == sorted(predicted)  # the budgets fall
    assert "\nTrue\n" in printed
    assert len(re.findall(r"^(?:up|down) (?:merged|as it is|dense) ", printed, re.MULTILINE)) == 2


def test_the_page_on_restructuring_names_every_structure() -> None:
    text = (ROOT / "docs" / "restructure.md").read_text(encoding="utf-8")
    assert [name for name in STRUCTURES if f"| `{name}` |" not in text] == []
    assert [name for name in Budget.model_fields if f"| `{name}` |" not in text] == []


@pytest.mark.parametrize("share", [75, 60, 50, 40, 30])
def test_the_recalls_on_the_page_are_committed_results(share: int) -> None:
    mode = f"2000 pairs, seed 0, {share}% of the parameters"
    providers = ("uniform plain SVD", "uniform whitened SVD", "Pixelfly's allocation", "solver")

    def found(provider: str, metric: str) -> float:
        return median("reverse_dictionary_minilm", mode, provider, metric)

    recalls = [found(each, "recall_at_1") for each in providers]
    losses = [f"{found(each, 'predicted_loss'):.3f}, {found(each, 'measured_loss'):.3f}" for each in providers[2:]]
    row = f"| {share}% | " + " | ".join([*(f"{each:.3f}" for each in recalls), *losses]) + " |"
    text = (ROOT / "docs" / "restructure.md").read_text(encoding="utf-8")
    assert row in text
    (used,) = re.findall(r"they have ([\d, and]+)% of the parameters", text)
    assert f"{100 * found(providers[2], 'share_of_parameters'):.0f}" in re.findall(r"\d+", used)
    assert recalls[3] >= max(recalls[:3])
    assert found("solver", "gap") == 0.0


def test_the_file_of_times_of_the_page_on_tuning_is_one() -> None:
    _, times = code(ROOT / "docs" / "tuning.md", "json")
    assert TimesFile.model_validate_json(times).layers


def test_layers_are_timed_as_the_page_on_tuning_says(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = [each for each in code(ROOT / "docs" / "tuning.md", "python") if "time_layers" in each]
    exec(compile(block, "docs/tuning.md", "exec"), {})
    assert "64x128, 2 tokens, float32, forward: dense" in capsys.readouterr().out


def test_the_table_of_the_page_on_tuning_is_one() -> None:
    table, _ = code(ROOT / "docs" / "tuning.md", "json")
    (entry,) = Table.model_validate_json(table).products
    assert isinstance(entry.cut, Tiles)
    assert entry.cut.m == 128


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"


@pytest.mark.parametrize("document", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_make_targets_exist(document: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = "".join(code(document, "sh"))
    for target in re.findall(r"^make (\w+)", commands, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


GRAPH = " bfloat16 random logits, 5% ignored, forward+backward, as CUDA graphs"


def median(name: str, mode: str, provider: str, metric: str) -> float:
    rows = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    (row,) = (r for r in rows if r["mode"].startswith(mode) and r["provider"] == provider and r["metric"] == metric)
    return float(row["p50"])


MEMORY = "peak_extra_above_gradients_bytes"
BEHIND = "time_behind_work_s"
README, DIVERGENCE = ROOT / "README.md", ROOT / "docs" / "linear_divergence.md"


@pytest.mark.parametrize(
    ("document", "line", "name", "mode", "metric", "unit"),
    [
        (README, "131072 classes", "linear_cross_entropy_h100", "16384x2048x131072", MEMORY, "MiB"),
        (README, "the same: time from", "linear_cross_entropy_h100", "16384x2048x131072", "time_s", "ms"),
        (README, "the same: time behind", "linear_cross_entropy_h100", "16384x2048x131072", BEHIND, "ms"),
        (
            README,
            "the same, as a CUDA graph",
            "linear_cross_entropy_graphs_h100",
            f"16384x2048x131072{GRAPH}",
            "time_s",
            "ms",
        ),
        (README, "65536 tokens", "linear_cross_entropy_large_h100", "65536x2048x131072", MEMORY, "MiB"),
        (README, "the same: time", "linear_cross_entropy_large_h100", "65536x2048x131072", "time_s", "ms"),
        (README, "50257 classes", "linear_cross_entropy_h100", "16384x768x50257", MEMORY, "MiB"),
        (README, "the same: time from", "linear_cross_entropy_h100", "16384x768x50257", "time_s", "ms"),
        (README, "the same: time behind", "linear_cross_entropy_h100", "16384x768x50257", BEHIND, "ms"),
        (
            README,
            "the same, as a CUDA graph",
            "linear_cross_entropy_graphs_h100",
            f"16384x768x50257{GRAPH}",
            "time_s",
            "ms",
        ),
        (README, "CPU, 2 threads", "linear_cross_entropy_cpu", "2048x256x32000", MEMORY, "MiB"),
        (README, "the same: time", "linear_cross_entropy_cpu", "2048x256x32000", "time_s", "ms"),
        (DIVERGENCE, "CPU, 2 threads", "linear_divergence_cpu", "2048x256x32000", MEMORY, "MiB"),
        (DIVERGENCE, "the same: time", "linear_divergence_cpu", "2048x256x32000", "time_s", "ms"),
    ],
)
def test_figures_are_committed_results(document: Path, line: str, name: str, mode: str, metric: str, unit: str) -> None:
    table = document.read_text(encoding="utf-8")
    scale = {"MiB": 2.0**-20, "ms": 1e3}[unit]
    found = [median(name, mode, provider, metric) * scale for provider in ("inductor", "structfly")]
    digits = 1 if unit == "ms" and found[0] < 100 else 0
    row = f"| {found[0]:.{digits}f} {unit} | {found[1]:.{digits}f} {unit} |"
    assert any(line in text and row in text for text in table.splitlines()), row


@pytest.mark.parametrize(
    ("line", "provider"),
    [
        ("| dense |", "dense"),
        ("| Monarch, 4 blocks, kept |", "monarch, 4 blocks"),
        ("| Monarch, 4 blocks, made again |", "monarch, 4 blocks, nothing kept"),
        ("| Monarch, 16 blocks, kept |", "monarch, 16 blocks"),
        ("| Monarch, 16 blocks, made again |", "monarch, 16 blocks, nothing kept"),
        ("| GBLR, a third, kept |", "gblr, masks of a quarter"),
        ("| GBLR, a third, made again |", "gblr, masks of a quarter, nothing kept"),
        ("| BLAST, 16 x 16 blocks, rank 512, kept |", "blast, 16 x 16 blocks, rank 512"),
        ("| BLAST, 16 x 16 blocks, rank 512, made again |", "blast, 16 x 16 blocks, rank 512, nothing kept"),
    ],
)
def test_speed_and_memory_in_training_are_committed_results(line: str, provider: str) -> None:
    mode = "16384x4096x4096 bfloat16, forward+backward"
    speed, memory = (median("structured_linear_h100", mode, provider, each) for each in ("x_dense", "peak_extra_bytes"))
    text = (ROOT / "docs" / "restructure.md").read_text(encoding="utf-8")
    assert f"{line} {speed:.2f} | {memory / 2**20:.0f} MiB |" in text.splitlines()


LAYERS = [*SETTINGS, GBLR, f"{GBLR}, nothing kept", *PEERS]


def layer_row(provider: str, *shapes: str) -> str:
    """Of the table of layers: how many times as fast as the dense one they are, and their share of its memory."""
    rows = json.loads((RESULTS / "structured_linear_h100.json").read_text(encoding="utf-8"))["rows"]
    found = {(row["mode"], row["provider"], row["metric"]): row["p50"] for row in rows}
    cells = [provider]
    for shape in shapes:
        modes = [f"{shape} bfloat16, {passes}" for passes in ("forward", "forward+backward")]
        cells += [f"{found[mode, provider, 'x_dense']:.2f}" for mode in modes if (mode, provider, "x_dense") in found]
        if (modes[1], provider, "x_dense") in found:
            peaks = [found[modes[1], each, "peak_extra_bytes"] for each in (provider, "dense")]
            cells.append(f"{peaks[0] / peaks[1]:.2f}")
        else:
            cells += ["-", "-"]
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("provider", LAYERS)
def test_speed_and_memory_of_layers_are_committed_results(provider: str) -> None:
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8").splitlines()
    assert layer_row(provider, "16384x4096x4096", "16384x4096x16384") in page
    if "pixelfly" in provider or provider in ("low rank, a quarter", "two products"):
        assert layer_row(provider, "32768x768x3072") in page


def kernels(mode: str, provider: str) -> list[tuple[str, float]]:
    """Of a training step, by name, in microseconds."""
    rows = json.loads((RESULTS / "structured_kernels_h100.json").read_text(encoding="utf-8"))["rows"]
    found = [row for row in rows if row["mode"] == f"{mode} bfloat16, forward+backward" and row["provider"] == provider]
    return [(row["metric"], 1e6 * row["p50"]) for row in found]


@pytest.mark.parametrize(
    ("line", "mode", "provider"),
    [
        ("BLAST, 16 x 16 blocks, rank 512", "16384x4096x4096", "blast, 16 x 16 blocks, rank 512"),
        ("BLAST, nothing kept", "16384x4096x4096", "blast, 16 x 16 blocks, rank 512, nothing kept"),
        ("Monarch, 4 blocks", "16384x4096x4096", "monarch, 4 blocks"),
        ("Monarch, 4 blocks, nothing kept", "16384x4096x4096", "monarch, 4 blocks, nothing kept"),
        ("GBLR, a third", "16384x4096x4096", "gblr, masks of a quarter"),
        ("Pixelfly, grid 8, 2 factors, rank 64", "32768x768x3072", "pixelfly, grid 8, 2 factors, rank 64"),
    ],
)
def test_what_bounds_layers_is_committed_results(line: str, mode: str, provider: str) -> None:
    mine, dense = (
        sum(time for metric, time in kernels(mode, each) if metric.startswith("device_s"))
        for each in (provider, "dense")
    )
    bounds = dict(kernels(mode, provider))
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    found = (mine, dense, bounds["multiplying_s"], bounds["moving_s"])
    assert f"| {line} | {mode} | {' | '.join(f'{time:.0f}' for time in found)} |" in page.splitlines()


def test_what_kernels_of_layers_take_is_committed_results() -> None:
    page = " ".join((ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8").split())
    (copy,) = {median("structured_kernels_h100", "536870912 bytes", "torch", "rate_byte_per_s")}
    of_x, of_z = 2 * 16384 * 4096, 2 * 16384 * 16 * 512
    blast = kernels("16384x4096x4096", "blast, 16 x 16 blocks, rank 512")
    forward = sum(time for _, time in blast[:3])
    assert f"({1e6 * (2 * of_x + 4 * of_z) / copy:.0f} us of {forward:.0f} forward" in page
    assert f"{1e6 * (6 * of_x + 12 * of_z) / copy:.0f} of {sum(time for m, time in blast if '_s of ' in m):.0f}" in page
    monarch = kernels("16384x4096x4096", "monarch, 4 blocks, nothing kept")
    last = sum(time for metric, time in monarch[6:] if metric.startswith("device_s"))
    assert f"{last:.0f} us in 16 launches where {monarch[0][1]:.0f} is one's" in page
    pixelfly = kernels("32768x768x3072", "pixelfly, grid 8, 2 factors, rank 64")
    mode = "gradients with low rank 32768x768x3072 bfloat16, blocks 96x384"
    spanning, within = (
        1e6 * median("block_products_h100", mode, f"128x{n}x64, {cut} resident", "time_s")
        for n, cut in ((64, "3 abreast, spanning, 4 warps, 2 stages, 2"), (128, "2 abreast, 8 warps, 3 stages, 1"))
    )
    assert f"{spanning:.0f} us where tiles within a cell take {within:.0f}" in page
    y, dz, factors, sums, dx = (pixelfly[number][1] for number in (3, 4, 5, 6, 7))
    assert f"y {y:.0f} us, dz {dz:.0f}, the factors' gradients {factors + sums:.0f}, dx {dx:.0f}" in page


def works() -> dict[tuple[str, str], dict[str, float]]:
    """ "x dense" by layer and pass, and the work before the calls."""
    rows = json.loads((RESULTS / "structured_work_before_h100.json").read_text(encoding="utf-8"))["rows"]
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        mode, _, work = row["mode"].partition(", behind ")
        if row["metric"] == "x_dense" and row["provider"] != "dense":
            found.setdefault((row["provider"], mode), {})[work] = row["p50"]
    return found


def test_what_work_before_calls_does_is_committed_results() -> None:
    short, long, own = "5 ms of products", "20 ms of products", "20 ms of its own calls"
    longer = [each[long] / each[short] - 1 for each in works().values()]
    itself = [each[own] / each[short] - 1 for each in works().values()]
    page = " ".join((ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8").split())
    assert f"at most {100 * max(map(abs, longer)):.0f}% slower or faster" in page
    assert f"of their own calls {-100 * min(itself):.0f}% slower to {100 * max(itself):.0f}% faster" in page


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        (
            "Pixelfly at 768 with gradients is {} in the table below and {} there behind 5 ms, where {} is wanted",
            "32768x768x3072 bfloat16, forward+backward",
        ),
        ("forward it is {} in both, which is its bar", "32768x768x3072 bfloat16, forward"),
    ],
)
def test_bars_that_two_runs_are_on_either_side_of_are_named(text: str, mode: str) -> None:
    provider = "pixelfly, grid 8, 2 factors, rank 64"
    rows = json.loads((RESULTS / "structured_linear_h100.json").read_text(encoding="utf-8"))["rows"]
    of = {row["metric"]: row["p50"] for row in rows if (row["mode"], row["provider"]) == (mode, provider)}
    one, wanted = of["x_dense"], of["x_dense_wanted"]
    other = works()[provider, mode]["5 ms of products"]
    assert other < wanted <= one
    page = " ".join((ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8").split())
    assert text.format(f"{one:.2f}", f"{other:.2f}", f"{wanted:.3g}") in page


def test_monarch_in_one_launch_is_slower_in_committed_results() -> None:
    rows = json.loads((RESULTS / "monarch_single_pass_h100.json").read_text(encoding="utf-8"))["rows"]
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    assert len(modes) == 6
    assert len({row["provider"] for row in rows}) == 1 + 21
    best: dict[str, tuple[float, float]] = {}
    for mode in modes:
        times = {row["provider"]: 1e6 * row["p50"] for row in rows if row["mode"] == mode}
        two = times.pop("two launches")
        best[mode] = min(times.values()), two
        assert min(times.values()) > two
    page = " ".join((ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8").split())
    (large, two), (few, two_of_few) = best[modes[0]], best[modes[-1]]
    assert f"from 768 to 3072 features {large:.0f} us against {two:.0f}" in page
    assert f"from 1024 to 1024 {few:.0f} against {two_of_few:.0f}" in page


def test_times_of_models_of_structured_layers_are_committed_results() -> None:
    mode = "32 blocks, 1536 hidden units, 4096 between, 4096 tokens, bfloat16, forward+backward+AdamW"
    layers = ("pixelfly, grid 16, 3 factors, rank 128", "monarch, 4 blocks", "dense")
    graph = [1e3 * median("structured_model_h100", f"{mode}, a CUDA graph a step", each, "time_s") for each in layers]
    launched = [1e3 * median("structured_model_launched_h100", mode, each, "time_s") for each in layers]
    text = " ".join((ROOT / "docs" / "restructure.md").read_text(encoding="utf-8").split())
    assert (
        f"took {graph[0]:.1f} ms as a graph with Pixelfly layers and {graph[1]:.1f} ms with Monarch's of 4 blocks, "
        f"where dense ones took {graph[2]:.1f} ms"
    ) in text
    assert f"they took {launched[0]:.0f}, {launched[1]:.0f} and {launched[2]:.0f} ms" in text
    waited = [median("structured_model_h100", f"{mode}, a CUDA graph a step", each, "waiting_share") for each in layers]
    assert max(waited) < 0.01

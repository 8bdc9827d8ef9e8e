"""What the benchmarks measure against, and what they write."""

import csv
import importlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import benchmarks
from benchmarks import head, linear_cross_entropy, recording
from benchmarks.head import Case
from benchmarks.recording import Row
from structfly.measure import Timing


def case(logits: str = "random", **changes: Any) -> Case:
    sizes: dict[str, Any] = {"rows": 50, "features": 8, "classes": 70, "dtype": "float32", "device": "cpu"}
    return Case(**{**sizes, "logits": logits, "ignored": 0.2, **changes})


PROGRAMS = sorted(each.stem for each in Path(benchmarks.__path__[0]).glob("*.py") if "\ndef main(" in each.read_text())


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_say_what_they_take(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"benchmarks.{name}").main(["--help"])
    assert end.value.code == 0
    assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize("logits", ["random", "trained"])
@pytest.mark.parametrize("loss", head.LOSSES)
def test_truth_is_the_definition_in_float64(logits: str, loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "REFERENCE_ROWS", 16)  # several chunks, the last one short
    ignored = 0.0 if loss in head.EVERY_ROW else 0.2
    inputs = head.make_inputs(case(logits, ignored=ignored, loss=loss))
    assert bool((inputs.t == head.IGNORED).any()) == bool(ignored)
    leaves = [tensor.detach().double().requires_grad_() for tensor in inputs.leaves]
    value = head.LOSSES[loss](F.linear, *leaves[:2], inputs.t, *leaves[2:])
    gradients = torch.autograd.grad(value, leaves)
    exact = head.truth(inputs, loss)
    for made, expected in zip((exact.loss, *exact.gradients), (value.detach(), *gradients), strict=True):
        torch.testing.assert_close(made, expected, rtol=1e-12, atol=1e-14)


# Inductor's workers and Dynamo warn of torch's own deprecations.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("provider", ["eager", "eager-float", "inductor", "structfly", "structfly@1MiB"])
@pytest.mark.parametrize(
    ("loss", "training"),
    [
        ("capped", True),
        ("capped", False),
        ("gathered", True),
        ("distilled", True),
        ("preferences", True),
        ("scaled", True),
    ],
)
def test_every_provider_computes_the_loss_it_is_asked_for(provider: str, loss: str, training: bool) -> None:
    torch._dynamo.reset()
    problem = case(loss=loss, training=training, ignored=0.0)
    inputs = head.make_inputs(problem)
    made = head.make_loss(provider, {"rewrite": "always"}, problem)
    errors = head.errors(head.make_step(made, inputs, training=training)(), inputs, head.truth(inputs, loss))
    gradients = head.GRADIENTS[: 2 + len(inputs.learned)] if training else ()
    assert errors.keys() == {"loss", *gradients}
    assert all(error < 1e-5 for error in errors.values())


def test_tf32_is_about_float32() -> None:
    assert "float32 as TF32" in case(tf32=True).mode
    assert "TF32" not in case().mode
    with pytest.raises(ValueError, match="tf32 is set and dtype is bfloat16"):
        case(dtype="bfloat16", tf32=True)


@pytest.mark.parametrize("loss", head.EVERY_ROW)
def test_a_loss_that_leaves_no_row_out_ignores_none(loss: str) -> None:
    with pytest.raises(ValueError, match=f"0.2 with the {loss} loss, which leaves no row out"):
        case(loss=loss)


def test_a_peer_does_not_answer_for_another_loss() -> None:
    with pytest.raises(ValueError, match="plain loss only, not 'capped'"):
        head.make_loss("liger", {}, case(loss="capped"))


def test_compiled_steps_are_cuda_graphs_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch, "compile", lambda definition, **options: asked.append(options["options"]))
    for graphs, provider in itertools.product((False, True), ("inductor", "structfly@1MiB")):
        head.make_loss(provider, {}, case(graphs=graphs))
    budget = {"budget": {"loss_memory": "1MiB"}}
    graph = {"mode": "reduce-overhead", **budget}
    assert asked == [None, budget, {"triton.cudagraphs": True}, graph]
    assert case(graphs=True).mode == f"{case().mode}, as CUDA graphs"


@pytest.mark.parametrize("passes", ["training", "evaluation"])
def test_a_measured_case_makes_a_table(passes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "peak_memory_in_own_process", lambda *_: 2**20)
    problem = case(training=passes == "training")
    rows = linear_cross_entropy.measure_case(problem, ["eager"], {}, repeats=1)
    assert {row.mode for row in rows} == {problem.mode}
    assert len(linear_cross_entropy.case_table(problem.mode, rows).rows) == 2  # eager, and the products alone


def test_errors_are_those_of_the_gradients_left() -> None:
    inputs = head.make_inputs(case())
    exact = head.truth(inputs)
    loss = head.make_step(head.make_loss("eager", {}, case()), inputs)()
    assert all(error < 1e-5 for error in head.errors(loss, inputs, exact).values())
    assert inputs.x.grad is not None
    inputs.x.grad *= 1.01
    assert head.errors(loss, inputs, exact)["dx"] == pytest.approx(0.01, rel=1e-3)
    inputs.x.grad = None
    with pytest.raises(ValueError, match="left no gradient"):
        head.errors(loss, inputs, exact)


def test_trained_logits_are_peaked() -> None:
    random, trained = (head.truth(head.make_inputs(case(logits))).loss for logits in ("random", "trained"))
    assert trained < random


def rows(structfly_time: float, structfly_bytes: float) -> list[Row]:
    timings = {"eager": 1.0, "inductor": 0.8, "structfly": structfly_time}
    times = [Row.of_timing(Timing(t, t, t, (t,)), kernel="k", provider=p, mode="m") for p, t in timings.items()]
    sizes = {"eager": 600.0, "inductor": 400.0, "structfly": structfly_bytes}
    metric = "peak_extra_bytes"
    return times + [Row.of_value(b, kernel="k", provider=p, mode="m", metric=metric) for p, b in sizes.items()]


@pytest.mark.parametrize(
    ("seconds", "size", "words"),
    [
        (0.84, 99.0, ["met", "met", "met"]),
        (0.85, 101.0, ["met", "MISSED", "MISSED"]),
        (0.86, 99.0, ["MISSED", "MISSED", "met"]),
    ],
)
def test_bars(seconds: float, size: float, words: list[str]) -> None:
    lines = linear_cross_entropy.bars(rows(seconds, size))
    assert sorted(line.split(":")[0] for line in lines) == sorted(words)


def test_results_are_written_with_their_provenance(tmp_path: Path) -> None:
    timing = Timing(2.0, 1.0, 3.0, (3.0, 1.0, 2.0))
    row = Row.of_timing(timing, kernel="k", provider="p", mode="m, with a comma")
    environment = {"torch": "2", "date": "2026-01-01"}
    table, raw = recording.write(tmp_path / "new" / "a.b", [row], environment=environment, command="run me")
    assert (table.name, raw.name) == ("a.b.csv", "a.b.json")
    with table.open(newline="") as file:
        (line,) = csv.DictReader(file)
    assert line["mode"] == "m, with a comma"
    assert (line["p20"], line["p50"], line["p80"]) == ("1.0", "2.0", "3.0")
    assert (line["torch"], line["date"], line["command"]) == ("2", "2026-01-01", "run me")
    assert "samples" not in line
    kept = json.loads(raw.read_text())
    assert kept["rows"][0]["samples"] == [3.0, 1.0, 2.0]
    assert kept["command"] == "run me"


def test_a_command_line_leaves_out_where_results_go() -> None:
    line = recording.command_line(
        "benchmarks.x", ["--output", "some/where", "--options", '{"a": 1}', "--traces", "here"]
    )
    assert line == "python -m benchmarks.x --options '{\"a\": 1}'"


def test_shapes_are_read_and_checked() -> None:
    chosen = linear_cross_entropy.parse_arguments(["--device", "cpu", "--shapes", "2x3x4", "5x6x7"])
    assert chosen.shapes == [(2, 3, 4), (5, 6, 7)]
    assert chosen.dtype == "float32"
    named = linear_cross_entropy.parse_arguments(["--device", "cpu", "--providers", "structfly@64MiB", "cce"])
    assert named.providers == ["structfly@64MiB", "cce"]
    with pytest.raises(SystemExit):
        linear_cross_entropy.parse_arguments(["--device", "cpu", "--providers", "liga"])
    for wrong in ("2x3", "2x3x0", "2x3x4x5", "a"):
        with pytest.raises(SystemExit):
            linear_cross_entropy.parse_arguments(["--device", "cpu", "--shapes", wrong])

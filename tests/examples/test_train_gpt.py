"""The demo's machinery, in a tiny configuration."""

import io
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from examples import train_gpt
from examples.gpt import GPT, GPTConfig
from examples.training import RunResult, RunSpec, draw_batch, perturb, train, turns, unit_roundoff
from examples.workers import Outcome, run_together

MODEL = GPTConfig(vocabulary=97, context=16, width=16, layers=1, heads=2)


@pytest.fixture
def spec(tmp_path: Path) -> RunSpec:
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, (np.arange(2000) ** 2 % 97).astype(np.uint16), allow_pickle=False)
    return RunSpec(
        backend="eager",
        variant="plain",
        device="cpu",
        tokens=str(tokens),
        end_of_text=0,
        batch=2,
        steps=5,
        seed=1,
        learning_rate=1e-3,
        model=MODEL,
    )


def console() -> Console:
    return Console(file=io.StringIO(), width=120)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_spec_survives_its_file(spec: RunSpec, tmp_path: Path) -> None:
    chosen = replace(spec, options={"mode": "default"})
    chosen.save(tmp_path / "spec.json")
    assert RunSpec.load(tmp_path / "spec.json") == chosen


def test_a_perturbation_is_one_rounding_of_every_entry() -> None:
    model = GPT(MODEL)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    perturb(model, unit_roundoff(torch.float32), seed=0)
    for old, new in zip(before, model.parameters(), strict=True):
        change = ((new.double() - old.double()) / old.double()).abs()
        assert change.max() <= 2 * unit_roundoff(torch.float32)
        if old.ndim == 2:  # the norms' weights are 1, and 1 + unit rounds back to 1
            assert change.min() > 0


def test_batches_repeat_and_skip_what_cannot_be_foretold(spec: RunSpec) -> None:
    tokens = torch.tensor([5, 6, 0, 7, 8, 9, 0] * 40)
    x, y = draw_batch(tokens, 0, spec, step=3)
    again, _ = draw_batch(tokens, 0, spec, step=3)
    other, _ = draw_batch(tokens, 0, spec, step=4)
    assert x.shape == y.shape == (2, 16)
    assert torch.equal(x, again)
    assert not torch.equal(x, other)
    after_end = torch.zeros_like(x, dtype=torch.bool)
    after_end[:, 1:] = x[:, :-1] == 0
    assert after_end.any()
    assert torch.equal(y, x.masked_fill(after_end, -100))


def test_the_demo_runs_and_passes(spec: RunSpec) -> None:
    out = console()
    assert train_gpt.demo(spec, ["structfly"], {"rewrite": "always"}, out)
    text = printed(out)
    assert text.count("PASS") == 3
    assert "FAIL" not in text
    assert "1 rewritten" in text
    assert f"torch {torch.__version__}" in text


def fake_runs(wrong_gradient: float, wrong_loss: float) -> Callable[..., dict[str, Outcome]]:
    """A stand-in for ``run_together`` whose "inductor" run is off by the given amounts."""

    def run(spec: RunSpec) -> Outcome:
        compiled = spec.backend == "inductor"
        first = {
            "loss": torch.tensor(2.0),
            "token_losses": torch.full((4,), 2.0 + 1e-6 * (spec.variant != "float64")),
            "gradient.w": torch.ones(3) + wrong_gradient * compiled,
        }
        losses = [2.0, 1.5, 1.2, 1.0 + wrong_loss * compiled]
        result = RunResult(losses=losses, seconds=[9.0, 9.0, 9.0, 0.5 if compiled else 1.0], peak_bytes=2**20)
        return Outcome(result, first)

    return lambda specs, tell: {name: run(spec) for name, spec in specs.items()}


@pytest.mark.parametrize(("gradient", "loss", "passes"), [(0.0, 0.0, True), (1e-3, 0.0, False), (0.0, 1e-2, False)])
def test_a_wrong_run_fails_the_demo(
    spec: RunSpec, monkeypatch: pytest.MonkeyPatch, gradient: float, loss: float, passes: bool
) -> None:
    monkeypatch.setattr(train_gpt, "run_together", fake_runs(gradient, loss))
    out = console()
    assert train_gpt.demo(spec, ["inductor"], {}, out) is passes
    assert ("FAIL inductor" in printed(out)) is not passes
    assert "500.0 ms" in printed(out)  # the first three steps are warm-up


@pytest.mark.parametrize("steps", [0, 5])
def test_a_failing_run_stops_the_others(spec: RunSpec, steps: int) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        run_together({"wrong": replace(spec, tokens="missing.npy", steps=steps)}, lambda line: None)


def test_a_run_steps_once_a_turn(spec: RunSpec, tmp_path: Path) -> None:
    result = train(spec, tmp_path, [None] * 2)
    first = load_file(tmp_path / "first_step.safetensors")
    assert len(result.losses) == len(result.seconds) == 2
    still = train(replace(spec, learning_rate=0.0), tmp_path, [None] * 2)
    assert result.losses[0] == still.losses[0] == first["loss"].item()
    assert result.losses[1] != still.losses[1]
    assert first["token_losses"].shape == (2 * 15,)
    assert {name for name in first if name.startswith("gradient.")} == {
        f"gradient.{name}" for name, _ in GPT(MODEL).named_parameters()
    }


def test_turns_answer_their_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("step\nstep\n"))
    printed = [capsys.readouterr().out for _ in turns()]
    assert printed == ["ready\n", "done\n"]
    assert capsys.readouterr().out == "done\n"


def test_the_command_line_fills_in_the_devices_sizes() -> None:
    chosen = train_gpt.parse_arguments(["--device", "cpu", "--steps", "7"])
    assert (chosen.steps, chosen.width) == (7, train_gpt.SIZES["cpu"]["width"])
    with pytest.raises(SystemExit):
        train_gpt.parse_arguments(["--steps", "3"])

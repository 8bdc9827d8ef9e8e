"""Training runs side by side: each a process of its own, taking their steps in turn."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from safetensors.torch import load_file
from torch import Tensor

from examples.training import RunResult, RunSpec


class Outcome(NamedTuple):
    """What a run measured, and its first step's "loss", "gradient.*" and, if eager, "token_losses"."""

    result: RunResult
    first_step: dict[str, Tensor]


class Worker:
    """A run of :mod:`examples.training`; the constructor returns when it is ready for its first training step."""

    def __init__(self, spec: RunSpec) -> None:
        self._folder = tempfile.TemporaryDirectory()
        spec.save(Path(self._folder.name) / "spec.json")
        command = [sys.executable, "-m", "examples.training", self._folder.name]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self._wait_for(b"ready\n")

    def step(self) -> None:
        """Take one training step.

        Raises:
            CalledProcessError: the run has failed; its own words are on the standard error.
        """
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # a run that has failed: its exit status says so below
            self._process.stdin.write(b"step\n")
        if not self._wait_for(b"done\n"):
            self._check_exit()

    def finish(self) -> Outcome:
        """Let the run measure its memory and end; what it found.

        Raises:
            CalledProcessError: the run has failed.
        """
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._check_exit()
        folder = Path(self._folder.name)
        result = RunResult(**json.loads((folder / "result.json").read_text()))
        return Outcome(result, load_file(folder / "first_step.safetensors"))

    def _wait_for(self, answer: bytes) -> bool:
        """Whether the run gives this answer before it ends."""
        assert self._process.stdout is not None
        return any(line == answer for line in iter(self._process.stdout.readline, b""))

    def _check_exit(self) -> None:
        status = self._process.wait()
        if status:
            raise subprocess.CalledProcessError(status, self._process.args)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._process:
            self._process.kill()  # does nothing to a run that has ended
        self._folder.cleanup()


def run_together(specs: Mapping[str, RunSpec], tell: Callable[[str], object]) -> dict[str, Outcome]:
    """Make all runs; their steps take turns, so that a machine that speeds up or slows down does so for all alike.

    Args:
        specs: runs by name.
        tell: is called with a line for each stage.
    """
    with ExitStack() as stack:
        workers = {}
        for name, spec in specs.items():
            tell(f"{name}: first loss and gradients ...")
            workers[name] = stack.enter_context(Worker(spec))
        tell("training, the runs in turn ...")
        for step in range(max(spec.steps for spec in specs.values())):
            for name, worker in workers.items():
                if step < specs[name].steps:
                    worker.step()
        tell("peak memory of each ...")
        return {name: worker.finish() for name, worker in workers.items()}

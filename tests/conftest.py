"""What all tests share: one torch thread for each parallel worker, hypothesis profiles, the gpu marker."""

import os
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores; torch reads this when it is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():  # Triton kernels run interpreted; read when triton is first imported
    os.environ["TRITON_INTERPRET"] = "1"
    from tests import interpreting

    interpreting.quicken()

settings.register_profile("dev", deadline=None)  # the first call of a case may compile
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(autouse=True)
def _no_times_known(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test begins without measured times of layers and leaves none behind."""
    from structfly.layer_times import store

    made: list[Path] = []  # when it is first asked for

    def user_path() -> Path:
        if not made:
            made.append(tmp_path_factory.mktemp("times") / "layer_times.json")
        return made[0]

    monkeypatch.setattr(store, "user_path", user_path)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))

"""What all tests share: one torch thread for each parallel worker, hypothesis profiles, the gpu marker."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores; torch reads this when it is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():  # Triton kernels run interpreted; read when triton is first imported
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile("dev", deadline=None)  # the first call of a case may compile
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))

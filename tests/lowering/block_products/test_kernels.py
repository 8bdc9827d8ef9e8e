"""The generated kernel compiles for the GPUs it is meant for."""

from __future__ import annotations

import os
import subprocess
import sys


def test_every_kernel_compiles_for_hopper() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.lowering.block_products.compile_kernels"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "compiled", done.stderr[-2000:]

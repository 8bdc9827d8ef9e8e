"""Importing structfly, or listing the backends, costs no more than it must, in a new interpreter."""

import subprocess
import sys


def run(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_import_does_not_initialize_cuda() -> None:
    run(
        "import torch\n"
        "def refuse(): raise AssertionError('CUDA was initialized')\n"
        "torch.cuda.init = torch.cuda._lazy_init = refuse\n"
        "import structfly, structfly.backend\n"
        "assert not torch.cuda.is_initialized()"
    )


def test_import_is_light() -> None:
    run(
        "import sys, structfly, structfly.backend\n"
        "heavy = {'triton', 'torch._inductor', 'torch._dynamo'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()"
    )


def test_listing_the_backends_does_not_import_structfly() -> None:
    run(
        "import sys, torch._dynamo\n"
        "assert 'structfly' in torch._dynamo.list_backends()\n"
        "assert 'structfly' not in sys.modules"
    )

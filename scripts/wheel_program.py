"""What the freshly installed wheel must do; ``wheel_smoke.py`` runs it in an environment of its own."""

import sys
from collections.abc import Callable
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor

ROWS, FEATURES, CLASSES = 24, 16, 300


def step(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), target)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(ROWS, FEATURES, requires_grad=True)
    weight = torch.randn(CLASSES, FEATURES, requires_grad=True)
    return x, weight, torch.randint(CLASSES, (ROWS,))


def loss_and_gradients(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> list[Tensor]:
    x, weight, target = inputs()
    loss = function(x, weight, target)
    return [loss, *torch.autograd.grad(loss, [x, weight])]


assert "structfly" in torch._dynamo.list_backends()
assert "structfly" not in sys.modules, "listing the backends imported the package"

# Left to itself, structfly may find that so small a step is not worth a rewrite.
options: dict[str, str | int | bool | Callable[..., Any]] = {"rewrite": "always", "strict": True}
compiled = loss_and_gradients(torch.compile(step, backend="structfly", options=options))
torch.testing.assert_close(compiled, loss_and_gradients(step))

import structfly  # noqa: E402 - torch.compile had to find the backend without it

report = structfly.explain(step, options=options)(*inputs())
assert [site.status for site in report.sites] == ["rewritten"], report

assert Path(structfly.__file__).is_relative_to(sys.prefix), structfly.__file__
assert version("structfly") == structfly.__version__
templates = files("structfly.lowering") / "templates"
assert any(entry.name.endswith(".jinja") for entry in templates.iterdir()), templates

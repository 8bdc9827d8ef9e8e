"""Private parts of torch are named in structfly/compat/ alone: a new torch release is one folder's work."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("structfly", "rewriter", "patterns", "lowering")
MODULES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def dotted(node: ast.expr) -> str | None:
    """The name that a chain of attributes spells, as in ``torch.fx.Node``; None for other expressions."""
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return base and f"{base}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else None


def private_torch_names(source: str) -> list[str]:
    """Every import and attribute that names a part of torch with a leading underscore, as ``line: name``."""
    tree = ast.parse(source)
    aliases: dict[str, str] = {}
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    found.append((node.lineno, alias.name))
                    aliases[alias.asname or "torch"] = alias.name if alias.asname else "torch"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.append((node.lineno, name))
                aliases[alias.asname or alias.name] = name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, _, rest = (dotted(node) or "").partition(".")
            if first in aliases:
                found.append((node.lineno, f"{aliases[first]}.{rest}"))
    return [f"{line}: {name}" for line, name in sorted(found) if is_private(name)]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_compat_names_private_parts(path: Path) -> None:
    names = private_torch_names(path.read_text())
    if path.parent == ROOT / "structfly" / "compat" and path.name != "__init__.py":
        assert names, "the modules of compat exist to name them"
    else:
        assert names == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch._inductor",
        "import torch._dynamo.utils as utils",
        "from torch._guards import tracing",
        "from torch.fx import _pytree",
        "import torch\ntorch._check(True)",
        "import torch as t\nt.amp.autocast_mode._enter_autocast",
        "from torch import fx\nfx.experimental._config",
        "import torch.nn.functional as F\nF._Reduction",
        "def f():\n    from torch import _C",
    ],
)
def test_every_way_to_name_one_is_seen(source: str) -> None:
    assert private_torch_names(source)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.fx.Node.__name__",
        "from torch import Tensor",
        "from structfly import _torch",
        "import _torch",
    ],
)
def test_public_names_pass(source: str) -> None:
    assert private_torch_names(source) == []

"""Build the distributions, install the wheel into an empty environment, and train with it there.

Run from the development environment: ``python scripts/wheel_smoke.py``.  Builds from a copy, so that nothing
an earlier build left behind can get into a wheel, and nothing is left behind here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
NOT_SOURCES = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")
FOLDERS = ("structfly", "rewriter", "patterns", "lowering")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = build(folder)
        check_contents(wheel)
        python = install(wheel, folder / "environment")
        program = shutil.copy(ROOT / "scripts" / "wheel_program.py", folder)
        run(python, "-I", program, cwd=folder)
    print(f"{wheel.name}: built from the tree and from the sdist, installed, trained one step")


def build(folder: Path) -> Path:
    """Build the sdist, a wheel from it and one from the tree with the same files; return the first wheel."""
    tree = folder / "tree"
    shutil.copytree(ROOT, tree, symlinks=True, ignore=NOT_SOURCES)
    command = [sys.executable, "-m", "build", "--quiet", "--no-isolation", "--outdir"]
    run(*command, folder / "through_sdist", tree, cwd=folder)
    run(*command, folder / "direct", "--wheel", tree, cwd=folder)
    (wheel,) = (folder / "through_sdist").glob("*.whl")
    (direct,) = (folder / "direct").glob("*.whl")
    if differing := files(wheel) ^ files(direct):
        fail(f"only in one of the wheels built from the sdist and from the tree: {differing}")
    return wheel


def check_contents(wheel: Path) -> None:
    """The wheel holds exactly the package's modules, templates, tables and type marker."""
    expected = {
        f"{'' if folder == 'structfly' else 'structfly/'}{path.relative_to(ROOT).as_posix()}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")  # does not follow the links in structfly/
        if path.suffix in (".py", ".jinja", ".json") or path.name == "py.typed"
    }
    found = {name for name in files(wheel) if ".dist-info/" not in name}
    if found != expected:
        fail(f"missing from the wheel: {expected - found}; not expected in it: {found - expected}")


def install(wheel: Path, environment: Path) -> Path:
    """Install the wheel into a new virtual environment, as pinned; return its interpreter."""
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    pin = re.search(r"^torch==.*$", CONSTRAINTS.read_text(), re.MULTILINE)
    if pin is None:
        fail(f"{CONSTRAINTS.name} does not pin torch; a line torch==VERSION is needed")
    pip: tuple[str | Path, ...] = (python, "-m", "pip", "install", "--quiet", "--constraint", CONSTRAINTS)
    run(*pip, pin[0], cwd=environment)
    run(*pip, wheel, cwd=environment)
    return python


def files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def run(*command: str | Path, cwd: Path) -> None:
    """Run a command that sees no Python path and no environment but its own."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    subprocess.run(command, cwd=cwd, check=True, env={k: v for k, v in os.environ.items() if k not in hidden})


def fail(message: str) -> NoReturn:
    raise SystemExit(f"wheel smoke test: {message}")


if __name__ == "__main__":
    main()

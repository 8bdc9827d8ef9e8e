"""What pyproject.toml says about the package, against the folders as they are."""

import os
import re
import tomllib
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS: dict[str, Any] = PYPROJECT["tool"]["setuptools"]
LINKED = ("rewriter", "patterns", "lowering")


def package(folder: Path) -> str:
    """The dotted name of a folder, given relative to the root."""
    inside = "" if folder.parts[0] == "structfly" else "structfly."
    return inside + ".".join(folder.parts)


def sources(pattern: str) -> list[Path]:
    """Files of the package relative to the root; the links in structfly/ are not followed."""
    found = (path for top in ("structfly", *LINKED) for path in (ROOT / top).rglob(pattern))
    return [path.relative_to(ROOT) for path in found]


def test_every_package_is_listed() -> None:
    packages = [package(path.parent) for path in sources("__init__.py")]
    assert sorted(SETUPTOOLS["packages"]) == sorted(packages)


def test_every_module_is_in_a_package() -> None:
    outside = [path for path in sources("*.py") if not (ROOT / path.parent / "__init__.py").exists()]
    assert outside == []


def test_every_template_and_table_is_shipped() -> None:
    shipped = {
        path.resolve().relative_to(ROOT.resolve())
        for name, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for path in (ROOT / name.replace(".", "/")).glob(pattern)
    }
    assert shipped == {Path("structfly/py.typed"), *sources("*.jinja"), *sources("*.json")}


@pytest.mark.parametrize("name", LINKED)
def test_link_and_package_dir_agree(name: str) -> None:
    assert os.readlink(ROOT / "structfly" / name) == f"../{name}"
    assert SETUPTOOLS["package-dir"][f"structfly.{name}"] == name


def test_no_other_folder_is_mapped() -> None:
    assert set(SETUPTOOLS["package-dir"]) == {f"structfly.{name}" for name in LINKED}


def test_backend_is_registered() -> None:
    (entry,) = entry_points(group="torch_dynamo_backends", name="structfly")
    assert entry.value == "structfly.backend:structfly"
    assert callable(entry.load())


def test_extras_are_pinned() -> None:
    """Whatever the development environment installs by name has a version in constraints.txt."""
    project = PYPROJECT["project"]
    wanted = [*project["dependencies"], *PYPROJECT["build-system"]["requires"]]
    wanted += [name for extra in project["optional-dependencies"].values() for name in extra]
    names = {re.split(r"[^\w-]", requirement)[0].lower() for requirement in wanted}
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {pin.split("==")[0].lower() for pin in pins}
    assert names <= pinned
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)

"""Text that every Python ships with: the standard library's own sources."""

from __future__ import annotations

import sysconfig
from pathlib import Path

_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests"})


def python_sources(root: Path | None = None) -> list[str]:
    """The ``*.py`` files under ``root`` (default: the standard library) as text, in the order of their paths.

    Tests and installed packages are left out, and files that are not UTF-8.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in sorted(root.rglob("*.py")):
        if _SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts[:-1]):
            try:
                documents.append(path.read_bytes().decode("utf-8"))
            except UnicodeDecodeError:
                continue
    return documents

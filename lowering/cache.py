"""The folder in which structfly keeps what it has generated and measured."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from structfly.errors import StructflyError


def cache_folder() -> Path:
    """``$STRUCTFLY_CACHE_DIR``, else ``structfly`` in the user's cache folder."""
    chosen = os.environ.get("STRUCTFLY_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "structfly"


def write_whole(path: Path, text: str, what: str) -> None:
    """Write a file of the cache, so that other processes see the old one or all of the new one.

    Args:
        what: names in the error what is written, as the subject of "cannot be kept".

    Raises:
        StructflyError: the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            file.write(text)
        Path(temporary).replace(path)
    except OSError as error:
        raise StructflyError(
            f"{what} cannot be kept in {path.parent}: {error.strerror}; "
            "set STRUCTFLY_CACHE_DIR to a folder that can be written"
        ) from error

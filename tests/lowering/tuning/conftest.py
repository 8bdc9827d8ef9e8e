"""A cache folder of a test's own, with choices that are made anew."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from structfly.lowering.linear_cross_entropy import tiles
from structfly.lowering.tuning import choice


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's cache folder; empty."""
    monkeypatch.setenv("STRUCTFLY_CACHE_DIR", str(tmp_path))
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    """As in a new process."""
    for cached in (choice.tiles_for, choice._user_table, choice._shipped_tables, tiles.head_tiles):
        cached.cache_clear()

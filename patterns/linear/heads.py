"""Heads, which are left dense by default: restructuring one hides it from the loss rule."""

from __future__ import annotations

from fnmatch import fnmatchcase

HEADS = ("lm_head", "*.lm_head", "head", "*.head", "embed_out", "*.embed_out")
"""Globs of names that heads have."""


def is_head(name: str) -> bool:
    """Whether a layer of this qualified name is a head, by its name."""
    return any(fnmatchcase(name, pattern) for pattern in HEADS)

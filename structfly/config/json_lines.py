"""Where in a JSON text a value stands, and what is wrong with it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

from pydantic import ValidationError

_SPACE = re.compile(r"[ \t\n\r,:]*")
_DECODER = json.JSONDecoder()


def line_of(text: str, path: Sequence[int | str]) -> int:
    """The line, from 1, of the value at ``path`` in valid JSON, or of the innermost value on the way that is there."""
    at = _skip(text, 0)
    for key in path:
        inner = _member(text, at, str(key)) if text[at] == "{" else _item(text, at, key) if text[at] == "[" else None
        if inner is None:
            break
        at = inner
    return text.count("\n", 0, at) + 1


def problems_in(error: ValidationError, source: str, text: str) -> Iterator[str]:
    """A line for each thing that is wrong in valid JSON, with the line of ``text`` that it stands in.

    Args:
        error: what validating ``text`` raised.
        source: the file's name.
    """
    for each in error.errors(include_url=False):
        location = each["loc"]
        allowed = ""
        if each["type"] == "extra_forbidden":
            allowed = "; it is unknown, remove it"
        elif each["type"] == "missing":
            allowed = "; add it"
        yield (
            f"{source}, line {line_of(text, location)}: {'.'.join(map(str, location))}: "
            f"{each['msg'].removeprefix('Value error, ')}{allowed}"
        )


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()


def _member(text: str, at: int, wanted: str) -> int | None:
    at = _skip(text, at + 1)
    while text[at] != "}":
        key, at = _DECODER.raw_decode(text, at)
        at = _skip(text, at)
        if key == wanted:
            return at
        at = _skip(text, _DECODER.raw_decode(text, at)[1])
    return None


def _item(text: str, at: int, wanted: object) -> int | None:
    at, index = _skip(text, at + 1), 0
    while text[at] != "]":
        if index == wanted:
            return at
        at, index = _skip(text, _DECODER.raw_decode(text, at)[1]), index + 1
    return None

"""Validation errors in the user's words: where the option stands, the value seen, what is allowed."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from structfly import compat
from structfly.config.fields import UNKNOWN_NAME, allowed_names, option_name
from structfly.config.model import Budget, Config, Override

_ALLOWED_TYPES = {"bool_type": "true or false", "dict_type": "a table", "model_type": "a table"}
_KEY = "[key]"  # what pydantic appends to the location of a mapping's key

_shorten = reprlib.Repr()
_shorten.maxstring = _shorten.maxother = 60


def shown(value: object) -> str:
    """The value as it is printed in messages: its ``repr``, shortened."""
    return _shorten.repr(value)


def problems_of(error: ValidationError, source: str, also_known: Sequence[str] = ()) -> list[str]:
    """One line for each thing pydantic found wrong.

    Args:
        error: the failed validation of a ``Config``.
        source: where the values came from, e.g. "options" or a file's name.
        also_known: names allowed at the top beside the fields of ``Config``.
    """
    return [f"{source}: {_problem(dict(each), also_known)}" for each in error.errors(include_url=False)]


def _problem(error: dict[str, Any], also_known: Sequence[str]) -> str:
    kind, location, message = error["type"], error["loc"], error["msg"]
    if location == ("config",):
        return "config is allowed in options only; a file cannot name another file"
    if kind == "extra_forbidden":
        known = [*_fields_at(location[:-1]), *(also_known if len(location) == 1 else ())]
        key = str(location[-1])
        remedy = "; Inductor's options go into the table inductor"
        return (
            f"{_path(location)} is unknown; allowed: {allowed_names(key, known)}"
            f"{remedy if option_name(key) in compat.inductor_options() else ''}"
        )
    if kind == UNKNOWN_NAME:
        return f"{_path(location[:-1])} is unknown; {message}"
    if kind == "invalid_key" or location[-1:] == (_KEY,):
        table = _path(location[: -2 if location[-1] == _KEY else -1])
        return f"{table or 'the table'} has the key {shown(error['input'])}; allowed: strings as keys"
    if kind == "literal_error":
        message = f"allowed: {error['ctx']['expected']}"
    elif kind in _ALLOWED_TYPES:
        message = f"allowed: {_ALLOWED_TYPES[kind]}"
    return f"{_path(location)} is {shown(error['input'])}; {message}"


def _fields_at(location: Sequence[object]) -> list[str]:
    tables: dict[object, type[BaseModel]] = {"budget": Budget, "overrides": Override}
    return list((tables[location[0]] if location else Config).model_fields)


def _path(location: Sequence[object]) -> str:
    """The location as a dotted TOML key."""
    return ".".join(
        str(part) if re.fullmatch(r"[\w-]+", str(part)) else json.dumps(part, ensure_ascii=False) for part in location
    )

"""All structures by name: what files may name, how they hold a setting, and what is offered by default."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, ValidationError

from structfly.patterns.blast import Blast
from structfly.patterns.block_butterfly import BlockButterfly
from structfly.patterns.block_sparse import BlockSparse
from structfly.patterns.flat_butterfly import FlatButterfly
from structfly.patterns.gblr import GBLR
from structfly.patterns.kronecker import KroneckerSparse
from structfly.patterns.low_rank import LowRank
from structfly.patterns.monarch import Monarch
from structfly.patterns.pivoted_low_rank import PivotedLowRank
from structfly.patterns.pixelfly import Pixelfly
from structfly.patterns.structure import Structure

_ALL: tuple[type[Structure], ...] = (
    LowRank,
    PivotedLowRank,
    Monarch,
    KroneckerSparse,
    BlockButterfly,
    BlockSparse,
    FlatButterfly,
    Pixelfly,
    Blast,
    GBLR,
)
STRUCTURES: Mapping[str, type[Structure]] = {each.name: each for each in _ALL}

OFFERED = ("low_rank", "pivoted_low_rank")
"""What ``restructure_`` offers by default: of what is near a trained weight under its statistics, these lose least for
their parameters; the others are for training from scratch, or where their speed counts."""


def _named(value: object) -> object:
    if not isinstance(value, Mapping):
        return value
    settings = dict(value)
    name = settings.pop("name", None)
    if name not in STRUCTURES:
        raise ValueError(f"name is {name!r}; allowed: {', '.join(STRUCTURES)}")
    try:
        return STRUCTURES[name].model_validate_json(json.dumps(settings))  # lists stand for tuples
    except ValidationError as error:
        raise ValueError("; ".join(_setting(name, each) for each in error.errors(include_url=False))) from None


def _setting(structure: str, error: Any) -> str:
    name = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"{name} is unknown; {structure} takes {', '.join(STRUCTURES[structure].model_fields)}"
    return f"{name}: {error['msg']}, not {error['input']!r}"


def _with_name(structure: Structure | None) -> Any:
    return None if structure is None else {"name": structure.name, **structure.model_dump(mode="json")}


NamedStructure = Annotated[Structure, BeforeValidator(_named), PlainSerializer(_with_name)]
"""A field of a file that holds a structure's name and settings: ``{"name": "low_rank", "rank": 64}``."""

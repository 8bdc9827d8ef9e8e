"""Field types of the configuration: how a value is read, and what an error says is allowed."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Protocol, TypeVar, runtime_checkable

from pydantic import AfterValidator, BeforeValidator, PlainSerializer, PlainValidator, ValidationInfo
from pydantic_core import PydanticCustomError

from structfly import compat

Value = TypeVar("Value")

WRONG_VALUE = "structfly_wrong_value"
UNKNOWN_NAME = "structfly_unknown_name"

# ---------------------------------------------------------------------------------- errors


def wrong_value(allowed: str) -> PydanticCustomError:
    """The error of a field whose value is not among ``allowed``."""
    return PydanticCustomError(WRONG_VALUE, "allowed: {allowed}", {"allowed": allowed})


def unknown_name(name: str, known: Iterable[str], allowed: str = "") -> PydanticCustomError:
    """The error of a key that is not among ``known``; ``allowed`` replaces a list that is too long."""
    return PydanticCustomError(UNKNOWN_NAME, "allowed: {allowed}", {"allowed": allowed_names(name, known, allowed)})


def allowed_names(name: str, known: Iterable[str], allowed: str = "") -> str:
    """What is allowed instead of ``name``, and which of it was probably meant."""
    names = sorted(known)
    text = allowed or ", ".join(names) or "nothing"
    close = difflib.get_close_matches(name, names, n=1)
    return f"{text}; did you mean {close[0]}?" if close else text


# ---------------------------------------------------------------------------------- tables


def as_dict(value: object) -> object:
    """Any mapping as a new dict, as pydantic's strict mode wants it; other values unchanged."""
    return dict(value) if isinstance(value, Mapping) else value


def read_only(table: Mapping[str, Value]) -> Mapping[str, Value]:
    """A view of the table that cannot be written to."""
    return MappingProxyType(dict(table))


# ---------------------------------------------------------------------------------- bytes

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"([0-9]{1,30}(?:\.[0-9]{1,30})?) ?((?:[KMG]I?)?B)", re.IGNORECASE | re.ASCII)
_ALLOWED_SIZES = (
    "a whole number of bytes above 0, a string such as '512MiB' or '1.5 GB' "
    "(units B, KB, MB, GB, KiB, MiB, GiB), or None"
)


def parse_bytes(value: object) -> int | None:
    """A number of bytes from an int or from a string with a unit; a fraction of a byte is dropped.

    KB, MB and GB are powers of 1000, KiB, MiB and GiB of 1024; upper and lower case mean the same.
    """
    if value is None:
        return None
    count = 0
    if isinstance(value, str):
        if match := _SIZE.fullmatch(value):
            count = int(Fraction(match[1]) * _UNITS[match[2].upper()])
    elif isinstance(value, int) and not isinstance(value, bool):
        count = value
    if count <= 0:
        raise wrong_value(_ALLOWED_SIZES)
    return count


# ---------------------------------------------------------------------------------- seconds


def _seconds(value: object) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf:
        return float(value)
    raise wrong_value("a number of seconds of at least 0")


# ---------------------------------------------------------------------------------- rules, structures and modes


def _known_rule(name: str, info: ValidationInfo) -> str:
    known = (info.context or {}).get("known_rules", ())
    if name not in known:
        raise unknown_name(name, known)
    return name


def _known_structures(value: object, info: ValidationInfo) -> tuple[str, ...] | None:
    if value is None:
        return None
    known = (info.context or {}).get("known_structures", ())
    if not isinstance(value, (list, tuple)):
        raise wrong_value(f"a list of names of structures, of {', '.join(known) or 'nothing'}")
    for name in value:
        if name not in known:
            raise wrong_value(allowed_names(str(name), known))
    return tuple(value)


def _known_mode(value: object) -> str | None:
    if value is None:
        return None
    modes = list(compat.inductor_modes())
    if not isinstance(value, str) or value not in modes:
        raise wrong_value(allowed_names(str(value), modes))
    return value


# ---------------------------------------------------------------------------------- Inductor's options


def option_name(key: str) -> str:
    """The name of the option that ``key`` means: torch.compile reads dashes as underscores."""
    return key.replace("-", "_")


def _flat_options(table: object) -> object:
    """Inductor's options by full name: ``{"triton": {"cudagraphs": x}}`` as ``{"triton.cudagraphs": x}``.

    A table is descended into only where it is a group of options; some options are tables themselves.
    """
    if not isinstance(table, Mapping):
        return table
    known = compat.inductor_options()
    flat: dict[object, object] = {}

    def descend(inner: Mapping[object, object], prefix: str) -> None:
        for key, value in inner.items():
            name = prefix + option_name(key) if isinstance(key, str) else key
            group = f"{name}."
            if isinstance(value, Mapping) and any(each.startswith(group) for each in known):
                descend(value, group)
            elif name in flat:
                raise wrong_value(f"each option once, but {name} is given twice")
            else:
                flat[name] = copied(value)

    descend(table, "")
    return flat


def copied(value: object) -> object:
    """A copy of nested dicts and lists, with the things in them shared."""
    if isinstance(value, Mapping):
        return {key: copied(inner) for key, inner in value.items()}
    return [copied(inner) for inner in value] if isinstance(value, list) else value


def _known_option(name: str) -> str:
    known = compat.inductor_options()
    if name not in known:
        raise unknown_name(name, known, "the names that torch._inductor.list_options() gives")
    return name


def _fitting_values(table: Mapping[str, object]) -> Mapping[str, object]:
    """Inductor's own check, which it makes only for options given to it directly; an int may stand for a float."""
    for name, value in table.items():
        kind = compat.inductor_option_type(name)
        if kind is type(None):  # no type declared, and the default is None
            continue
        try:
            fits = isinstance(value, kind) or (isinstance(value, int) and isinstance(float(value), kind))
        except TypeError:  # a parametrised type, which isinstance does not take
            continue
        if not fits:
            raise wrong_value(f"for {name} a value of type {getattr(kind, '__name__', kind)}")
    return table


# ---------------------------------------------------------------------------------- plans


@runtime_checkable
class LayerPlan(Protocol):
    """A :class:`structfly.Plan`, as far as the configuration knows it."""

    @property
    def layers(self) -> Mapping[str, Any]: ...


def _plan(value: object) -> Path | LayerPlan | None:
    if value is None or isinstance(value, (Path, LayerPlan)):
        return value
    if isinstance(value, str) and value:
        return Path(value)
    raise wrong_value("the path of a saved plan, a structfly.Plan, or None")


# ---------------------------------------------------------------------------------- the types

ByteCount = Annotated[int | None, PlainValidator(parse_bytes)]
Rewrite = Literal["auto", "always"]
Mode = Annotated[str | None, PlainValidator(_known_mode)]
Seconds = Annotated[float, PlainValidator(_seconds)]
Structures = Annotated[tuple[str, ...] | None, PlainValidator(_known_structures)]
PlanOrPath = Annotated[Path | LayerPlan | None, PlainValidator(_plan)]
RuleSwitches = Annotated[
    Mapping[Annotated[str, AfterValidator(_known_rule)], bool],
    BeforeValidator(as_dict),
    AfterValidator(read_only),
    PlainSerializer(dict),
]
InductorTable = Annotated[
    Mapping[Annotated[str, AfterValidator(_known_option)], Any],
    BeforeValidator(_flat_options),
    AfterValidator(_fitting_values),
    AfterValidator(read_only),
    PlainSerializer(dict),
]

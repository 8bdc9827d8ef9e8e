"""Tables of tiles: JSON files whose entries say which products they are for, and how those are cut or that torch
makes them.

An entry names as much of a :class:`~structfly.lowering.tuning.products.ProductClass` as it depends on; what it leaves
out may be anything.  Of those that match, the one that names most counts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from structfly.config.problems import shown
from structfly.errors import ConfigError
from structfly.lowering.cache import cache_folder, write_whole
from structfly.lowering.gemm import TORCH_MM, Cut, Library, Tiles
from structfly.lowering.tuning.limits import why_not
from structfly.lowering.tuning.products import KINDS, Layout, ProductClass, size_class

_SHIPPED = ("hopper.json",)


def _capability(value: str) -> str:
    major, _, minor = value.partition(".")
    if not (major.isdecimal() and minor.isdecimal()):
        raise ValueError('allowed: a compute capability, such as "9.0"')
    return value


def _template(value: str) -> str:
    if value not in KINDS:
        raise ValueError(f"allowed: {', '.join(KINDS)}")
    return value


def _size(value: int) -> int:
    if value != size_class(value):
        raise ValueError(f"allowed: a power of two; {size_class(value)} stands for sizes like this one")
    return value


Size = Annotated[int, Field(ge=1), AfterValidator(_size)]


class Entry(BaseModel):
    """How some products are made on devices of one compute capability: by tiles, or by a library."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    template: Annotated[str, AfterValidator(_template)]
    capability: Annotated[str, AfterValidator(_capability)]
    device: str | None = None
    hooks: tuple[str, ...] | None = None
    dtype: Literal["bfloat16"] | None = None
    layout: Layout | None = None
    m: Size | None = None
    n: Size | None = None
    k: Size | None = None
    tiles: Tiles | None = None
    library: Library | None = None

    @field_validator("hooks")
    @classmethod
    def _sorted(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if value is None else tuple(sorted(value))

    @model_validator(mode="after")
    def _supported(self) -> Entry:
        allowed = KINDS[self.template].hooks
        if unknown := sorted(set(self.hooks or ()) - set(allowed)):
            raise ValueError(f"hooks has {unknown[0]!r}; allowed for {self.template}: {', '.join(allowed) or 'none'}")
        if (self.tiles is None) == (self.library is None):
            raise ValueError("tiles and library are both there; give one" if self.tiles else "tiles is missing")
        major, _, minor = self.capability.partition(".")
        if reason := why_not(self.template, self.cut, (int(major), int(minor))):
            raise ValueError(f"{'tiles' if self.tiles else 'library'}: {reason}")
        return self

    @property
    def cut(self) -> Cut:
        """The tiles, or the library."""
        return self.tiles or TORCH_MM

    @property
    def selects(self) -> dict[str, Any]:
        """What it names."""
        return self.model_dump(exclude={"tiles", "library"}, exclude_none=True)

    def matches(self, product: ProductClass) -> bool:
        """Whether it is for this product."""
        return self.selects.items() <= _selected(product).items()


class Table(BaseModel):
    """What a file holds."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    format: Literal[1] = 1
    products: tuple[Entry, ...] = ()

    @model_validator(mode="after")
    def _one_entry_each(self) -> Table:
        seen: list[dict[str, Any]] = []
        for number, entry in enumerate(self.products):
            if entry.selects in seen:
                first = seen.index(entry.selects)
                raise ValueError(f"products[{number}] is for the same products as products[{first}]; remove one")
            seen.append(entry.selects)
        return self

    def find(self, product: ProductClass) -> Cut | None:
        """What the entry has that names most of those that match; of several such the first."""
        found = [entry for entry in self.products if entry.matches(product)]
        return max(found, key=lambda entry: len(entry.selects)).cut if found else None

    def with_choices(self, choices: Sequence[tuple[ProductClass, Cut]]) -> Table:
        """The same with entries for just these products, in the place of those that there were for them."""
        made = [Entry(**_selected(product), **_of(cut)) for product, cut in choices]
        selected = [entry.selects for entry in made]
        kept = [entry for entry in self.products if entry.selects not in selected]
        return Table(products=(*kept, *made))


def user_path() -> Path:
    """Where the user's table is kept."""
    return cache_folder() / "tiles.json"


def read_user_table() -> Table:
    """The user's table; empty if there is no file.

    Raises:
        ConfigError: the file cannot be read or is no table; one line for each thing wrong in it.
    """
    path = user_path()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return Table()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; mend it, or remove it and tune again") from error
    return _parsed(text, str(path))


def write_user_table(table: Table) -> Path:
    """Keep it, whole or not at all.

    Raises:
        StructflyError: the cache folder cannot be written.
    """
    path = user_path()
    content = table.model_dump(exclude_none=True)
    write_whole(path, json.dumps(content, indent=2) + "\n", "tuned tiles")
    return path


def shipped_tables() -> list[Table]:
    """Those that come with structfly."""
    folder = resources.files("structfly.lowering.tuning")
    return [_parsed(folder.joinpath(name).read_text(encoding="utf-8"), name) for name in _SHIPPED]


def _selected(product: ProductClass) -> dict[str, Any]:
    """The product in an entry's words."""
    assert product.device.capability is not None, "tables are for CUDA devices"
    major, minor = product.device.capability
    named = {
        "template": product.template,
        "capability": f"{major}.{minor}",
        "device": product.device.name,
        "hooks": tuple(sorted(product.hooks)),
        "dtype": product.dtype,
        "layout": product.layout,
        "m": product.m,
        "n": product.n,
        "k": product.k,
    }
    return {name: value for name, value in named.items() if value is not None}


def _of(cut: Cut) -> dict[str, Any]:
    return {"library" if cut == TORCH_MM else "tiles": cut}


def _parsed(text: str, source: str) -> Table:
    try:
        return Table.model_validate_json(text)
    except ValidationError as error:
        lines = [f"{source}: {_problem(each)}" for each in error.errors(include_url=False)]
        raise ConfigError("\n".join([*lines, "mend it, or remove it and tune again"])) from error


def _problem(error: Any) -> str:
    """One thing that pydantic found wrong, in the words of the file."""
    where, kind = _path(error["loc"]), error["type"]
    if kind == "json_invalid":
        return f"not valid JSON: {error['ctx']['error']}"
    if kind == "missing":
        return f"{where} is missing"
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{where} is unknown; allowed: {', '.join(_fields_at(error['loc'][:-1]))}"
    message = error["msg"].removeprefix("Value error, ")
    if kind == "literal_error":
        message = f"allowed: {error['ctx']['expected']}"
    if isinstance(error["input"], dict | list):  # an entry, or the table: the message says what of it
        return f"{where}: {message}" if where else message
    return f"{where} is {shown(error['input'])}; {message}"


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    if "tiles" in location:
        return list(Tiles.__dataclass_fields__)
    return list((Entry if location else Table).model_fields)


def _path(location: tuple[int | str, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")

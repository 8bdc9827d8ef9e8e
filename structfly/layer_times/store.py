"""What was measured of layers, in files: one in the user's cache folder, and those that are shipped.

An entry is of one dense layer under one set of conditions, with the layers that were timed in turns with it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypeAlias, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from structfly import measure
from structfly.config.json_lines import problems_in
from structfly.errors import ConfigError, StructflyError
from structfly.lowering.cache import cache_folder, write_whole
from structfly.lowering.precision import tf32_allowed
from structfly.patterns.structure import Structure
from structfly.patterns.structures import NamedStructure
from structfly.records.layer import AppliedOp, LayerSizes, Passes
from structfly.version import __version__

log = logging.getLogger("structfly.layer_times")

Precision: TypeAlias = Literal["float64", "float32", "tf32", "bfloat16", "float16"]
"""What products run in: a dtype, or float32 rounded to TF32."""


def precision_of(dtype: torch.dtype, device_type: str) -> Precision | None:
    """What products of ``dtype`` run in under the present settings of torch; None for one that no entry is of."""
    if dtype == torch.float32 and device_type == "cuda" and tf32_allowed():
        return "tf32"
    name = str(dtype).removeprefix("torch.")
    return next((each for each in get_args(Precision) if each == name), None)


class Key(NamedTuple):
    """What an entry is of, apart from where it was measured."""

    sizes: LayerSizes
    precision: Precision
    passes: Passes
    tokens: int


class Origin(NamedTuple):
    """Where and with what it was measured."""

    device: str
    torch: str
    structfly: str


def origin_on(device: torch.device) -> Origin:
    """This device, with what is installed.

    Raises:
        UnsupportedError: for a device on which nothing can be measured.
    """
    return Origin(measure.device_name(device), torch.__version__, __version__)


class DeviceRates(BaseModel):
    """What a device was measured to do: operations a second of large products, a multiply-add counting two, bytes a
    second through its memory, and seconds of the smallest call."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    device: str
    torch: str
    structfly: str
    matrix_rate: dict[Precision, Annotated[float, Field(gt=0, allow_inf_nan=False)]]
    bandwidth: float = Field(gt=0, allow_inf_nan=False)
    launch_seconds: float = Field(gt=0, allow_inf_nan=False)

    @property
    def origin(self) -> Origin:
        """Where it was measured."""
        return Origin(self.device, self.torch, self.structfly)


class TimedStructure(BaseModel):
    """A layer that was timed beside the dense one."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    structure: NamedStructure
    relative: float = Field(gt=0, allow_inf_nan=False)


class TimedOp(BaseModel):
    """The same of a layer that is known as its op has it; see :class:`~structfly.records.layer.AppliedOp`."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    op: str
    factors: tuple[tuple[int, ...], ...]
    static: tuple[int, ...] = ()
    relative: float = Field(gt=0, allow_inf_nan=False)

    @property
    def applied(self) -> AppliedOp:
        """What it is."""
        return AppliedOp(self.op, self.factors, self.static)


class TimedLayer(BaseModel):
    """An entry; ``dense`` in seconds, ``relative`` times of others to the dense layer's in the same rounds."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    device: str
    torch: str
    structfly: str
    precision: Precision
    passes: Passes
    in_features: int = Field(ge=1)
    out_features: int = Field(ge=1)
    tokens: int = Field(ge=1)
    dense: float = Field(gt=0, allow_inf_nan=False)
    structures: tuple[TimedStructure, ...] = ()
    ops: tuple[TimedOp, ...] = ()

    @property
    def key(self) -> Key:
        """What it is of."""
        return Key(LayerSizes(self.in_features, self.out_features), self.precision, self.passes, self.tokens)

    @property
    def origin(self) -> Origin:
        """Where it was measured."""
        return Origin(self.device, self.torch, self.structfly)

    @property
    def relative(self) -> dict[Structure | AppliedOp, float]:
        """By structure, and by what an op has."""
        found: dict[Structure | AppliedOp, float] = {each.structure: each.relative for each in self.structures}
        found.update((each.applied, each.relative) for each in self.ops)
        return found

    @classmethod
    def of(cls, origin: Origin, key: Key, dense: float, relative: Mapping[Structure | AppliedOp, float]) -> TimedLayer:
        """The entry with these times."""
        return cls(
            **origin._asdict(),
            precision=key.precision,
            passes=key.passes,
            in_features=key.sizes.in_features,
            out_features=key.sizes.out_features,
            tokens=key.tokens,
            dense=dense,
            structures=tuple(
                TimedStructure(structure=each, relative=time)
                for each, time in relative.items()
                if isinstance(each, Structure)
            ),
            ops=tuple(
                TimedOp(**each._asdict(), relative=time)
                for each, time in relative.items()
                if isinstance(each, AppliedOp)
            ),
        )

    @model_validator(mode="after")
    def _fitting(self) -> TimedLayer:
        if len(self.relative) < len(self.structures) + len(self.ops):
            raise ValueError("structures or ops has a layer twice; remove one")
        for each in self.structures:
            if reason := each.structure.why_not(self.key.sizes):
                raise ValueError(f"structures has {each.structure!r}; {reason}")
        return self


class TimesFile(BaseModel):
    """What a file holds."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    format: Literal[1] = 1
    devices: tuple[DeviceRates, ...] = ()
    layers: tuple[TimedLayer, ...] = ()

    @model_validator(mode="after")
    def _one_entry_each(self) -> TimesFile:
        seen: dict[tuple[Origin, Key], int] = {}
        for number, each in enumerate(self.layers):
            first = seen.setdefault((each.origin, each.key), number)
            if first != number:
                raise ValueError(f"layers.{number} is of the same layer as layers.{first}; remove one")
        origins = [each.origin for each in self.devices]
        for number, origin in enumerate(origins):
            if origins.index(origin) != number:
                raise ValueError(
                    f"devices.{number} is of the same device as devices.{origins.index(origin)}; remove one"
                )
        return self

    def rates_of(self, origin: Origin) -> DeviceRates | None:
        """What was measured of a device with these versions."""
        return next((each for each in self.devices if each.origin == origin), None)

    def with_rates(self, rates: DeviceRates) -> TimesFile:
        """The same with these, over those of the same device and versions."""
        before = self.rates_of(rates.origin)
        others = [each for each in self.devices if each.origin != rates.origin]
        known = {} if before is None else before.matrix_rate
        made = rates.model_copy(update={"matrix_rate": {**known, **rates.matrix_rate}})
        return TimesFile(devices=(*others, made), layers=self.layers)

    def with_entries(self, entries: Iterable[TimedLayer]) -> TimesFile:
        """The same with these; where there was an entry of the same layer, the structures that only it has stay."""
        found = {(each.origin, each.key): each for each in self.layers}
        for each in entries:
            old = found.get((each.origin, each.key))
            relative = {} if old is None else old.relative
            found[each.origin, each.key] = TimedLayer.of(
                each.origin, each.key, each.dense, {**relative, **each.relative}
            )
        return TimesFile(devices=self.devices, layers=tuple(found.values()))


def user_path() -> Path:
    """Where the user's file is kept."""
    return cache_folder() / "layer_times.json"


def read_times(path: Path) -> TimesFile:
    """A file; empty if there is none.

    Raises:
        ConfigError: it cannot be read, or holds something else; one line for each thing wrong in it.
    """
    remedy = "mend it, or remove it and measure again"
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return TimesFile()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; {remedy}") from error
    try:
        return _parsed(text, str(path))
    except ConfigError as error:
        raise ConfigError(f"{error}\n{remedy}") from error


def read_user_times() -> TimesFile:
    """The user's file; see :func:`read_times`."""
    return read_times(user_path())


def add_times(path: Path, entries: Iterable[TimedLayer]) -> None:
    """Add entries to a file, which is written whole or not at all.

    Raises:
        ConfigError: there is a file already, and it holds something else.
        StructflyError: its folder cannot be written.
    """
    write_times(path, read_times(path).with_entries(entries))


def write_times(path: Path, file: TimesFile) -> None:
    """Write a file, whole or not at all.

    Raises:
        StructflyError: its folder cannot be written.
    """
    content = file.model_dump(mode="json")
    write_whole(path, json.dumps(content, indent=1) + "\n", "measured times of layers")


def keep_times(entries: Iterable[TimedLayer]) -> None:
    """Add entries to the user's file; where that cannot be, say so in the log, for plans can be made without."""
    entries = list(entries)
    try:
        if entries:
            add_times(user_path(), entries)
    except StructflyError as error:
        log.warning("%s", error)


def known_times(origin: Origin, users: TimesFile) -> Iterator[TimedLayer]:
    """Entries of this device, what counts more later: those that are shipped, measured with any torch, then the user's,
    measured with this version of torch and structfly."""
    for file in shipped_files():
        yield from (each for each in file.layers if each.device == origin.device)
    yield from (each for each in users.layers if each.origin == origin)


def shipped_files() -> Iterator[TimesFile]:
    """Those that come with structfly."""
    folder = resources.files("structfly.layer_times")
    for file in sorted(folder.iterdir(), key=lambda each: each.name):
        if file.name.endswith(".json"):
            yield _parsed(file.read_text(encoding="utf-8"), file.name)


def _parsed(text: str, source: str) -> TimesFile:
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{source}, line {error.lineno}: no JSON: {error.msg}") from error
    try:
        return TimesFile.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError("\n".join(problems_in(error, source, text))) from error

"""From ``options`` and a TOML file to a ``Config``, or to one error that lists everything wrong in both."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from structfly.config.budget import Limits
from structfly.config.model import Config, merged
from structfly.config.problems import problems_of, shown
from structfly.errors import ConfigError

_ARGUMENT = "torch.compile"  # the source of what is given to torch.compile beside options


class _Layer(NamedTuple):
    """The values of one source, and names allowed there beside the fields of ``Config``."""

    source: str
    table: Mapping[str, object]
    also_known: tuple[str, ...] = ()


def load_config(
    options: Mapping[str, object] | None,
    mode: str | None = None,
    *,
    known_rules: Iterable[str] = (),
    known_structures: Iterable[str] = (),
) -> Config:
    """The configuration that ``torch.compile(step, options=options)`` or ``(step, mode=mode)`` asks for.

    Args:
        options: fields of ``Config`` as plain values, and ``"config"``, the path of a TOML file with the
            same fields.  A file with a ``[tool]`` table is read from ``[tool.structfly]``, any other from its
            top.  Values in ``options`` win over the file's, table by table.
        mode: the mode given to torch.compile itself.
        known_rules: names of the rules there are.
        known_structures: names of the structures there are.

    Raises:
        ConfigError: an option is unknown or has a wrong value, the file cannot be read, or two modes, or a plan and
            a budget of layers, are given.  The message has one line for each problem.
    """
    if options is not None and not isinstance(options, Mapping):
        raise ConfigError(f"options is {shown(options)}; allowed: a mapping from option names to values")
    problems: list[str] = []
    table = dict(options or {})
    layers: list[_Layer] = []
    if "config" in table:
        try:
            layers.append(_read_file(table.pop("config")))
        except ConfigError as error:
            problems.append(str(error))
    layers.append(_Layer("options", table, also_known=("config",)))
    if mode is not None:
        layers.append(_Layer(_ARGUMENT, {"mode": mode}))

    known = {"known_rules": tuple(known_rules), "known_structures": tuple(known_structures)}
    config = Config()
    for layer in layers:
        try:
            read = Config.model_validate(layer.table, context=known)
        except ValidationError as error:
            problems.extend(problems_of(error, layer.source, layer.also_known))
            continue
        if layer.source == _ARGUMENT and config.mode not in (None, mode):
            problems.append(f"{_ARGUMENT}: mode is {mode!r}, but the option mode is {config.mode!r}; give one")
        config = merged(config, read)
    if config.plan is not None and config.budget.limits_layers:
        limits = [name for name in Limits.model_fields if getattr(config.budget, name) is not None]
        problems.append(
            f"options: plan is given together with budget.{', budget.'.join(limits)}; a plan stands instead of a "
            "budget of layers, leave one of them out"
        )
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def _read_file(path: object) -> _Layer:
    """The table that a TOML file holds for structfly."""
    if not isinstance(path, str | Path):
        raise ConfigError(f"options: config is {shown(path)}; allowed: the path of a TOML file")
    source = str(path)
    try:
        top = tomllib.loads(Path(path).read_bytes().decode())
    except OSError as error:
        raise ConfigError(f"options: config is {source!r}, which cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: not UTF-8, as TOML must be: {error.reason} at byte {error.start}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: not valid TOML: {error}") from error
    except ValueError as error:
        raise ConfigError(f"options: config is {source!r}, which is no path: {error}") from error
    return _own_table(source, top)


def _own_table(source: str, top: dict[str, object]) -> _Layer:
    """The ``[tool.structfly]`` table of a file that other tools may share, else all of it."""
    if "tool" not in top:
        return _Layer(source, top)
    tool = top["tool"]
    own = tool.get("structfly") if isinstance(tool, dict) else None
    if not isinstance(own, dict):
        raise ConfigError(f"{source}: has [tool] but no table [tool.structfly], which is where the options are read")
    if outside := sorted(top.keys() & Config.model_fields.keys()):
        raise ConfigError(f"{source}: {', '.join(outside)} outside [tool.structfly]; move it into that table")
    return _Layer(f"{source} [tool.structfly]", own)
